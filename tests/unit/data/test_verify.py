"""Every damaged byte is found, and the sample that it hits is named."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.inspection.verify import Verdict, verify
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.folder_index import index_folders
from swinv2_scale.data.shards.manifest import INDEX_ENTRY, read_manifest, write_manifest
from swinv2_scale.data.shards.writer import RawSample, write_shards
from swinv2_scale.errors import DataError
from tests.support.pictures import encoded, noise

NUM_SAMPLES, PER_SHARD = 12, 4


def jpeg(seed: int) -> bytes:
    return encoded(noise(seed, 20, 16))


def mask(size: tuple[int, int]) -> bytes:
    return encoded(Image.new("L", size, 3), "PNG")


def samples() -> list[RawSample]:
    return [{"__key__": f"k{i:02d}", "jpg": jpeg(i), "cls": str(i % 3).encode()} for i in range(NUM_SAMPLES)]


def write(folder: Path, raw: list[RawSample] | None = None, classes: int = 3) -> Path:
    schema = {"classes": [f"class {i}" for i in range(classes)]}
    write_shards(raw or samples(), folder, samples_per_shard=PER_SHARD, made_by="a test", schema=schema)
    return folder


def check(folder: Path, *, decode: bool = True, processes: int = 1) -> Verdict:
    remote = RemoteFiles(RemoteConfig(cache_dir=str(folder / "cache")))
    return verify(str(folder / "*.tar"), remote, str(folder / "apart"), decode=decode, processes=processes)


def named(verdict: Verdict) -> list[tuple[str, int, str]]:
    return [(Path(d.shard).name, d.number, d.key) for d in verdict.damaged]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("verify") / "s")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_shards_are_whole(whole: Path, processes: int) -> None:
    verdict = check(whole, processes=processes)
    assert verdict == Verdict(NUM_SAMPLES, 0, [], [], [])
    assert verdict.is_whole


def test_any_changed_byte_of_a_tar_is_found_and_its_sample_named(copy: Path) -> None:
    path = copy / "000001.tar"
    data = path.read_bytes()
    index = list(INDEX_ENTRY.iter_unpack((copy / "000001.tar.index").read_bytes()))
    numbers = random.Random(0)
    places = {start + at for start, length, _ in index for at in (0, 1, 124, 156, 511, 512, length - 1)}
    for place in sorted(places | {*range(0, len(data), 211), len(data) - 1}):
        damaged = bytearray(data)
        damaged[place] ^= 1 << numbers.randrange(8)
        path.write_bytes(damaged)
        verdict = check(copy, decode=False)
        hit = [n for n, (start, length, _) in enumerate(index) if start <= place < start + length]
        assert not verdict.is_whole, place
        assert verdict.num_damaged == len(hit)
        assert "000001.tar isn't as its manifest says" in verdict.problems[0]
        assert named(verdict) == [("000001.tar", n, f"k{4 + n:02d}") for n in hit], place


def test_any_changed_byte_of_an_index_is_found_and_its_sample_named(copy: Path) -> None:
    path = copy / "000002.tar.index"
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        verdict = check(copy, decode=False)
        assert ("000002.tar", place // 24, f"k{8 + place // 24:02d}") in named(verdict)
        assert verdict.num_damaged == 1


def test_any_changed_byte_of_a_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (0, 3) if chr(data[place]).isspace() else (place % 7,):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = not check(copy, decode=False).is_whole
            except DataError as error:
                found = "manifest" in str(error)
            assert found, (place, bytes(damaged[place - 10 : place + 10]))


@pytest.mark.parametrize("kept", [0, 100, 512, 2000, 4000, -512])
def test_a_cut_shard_has_the_samples_before_the_cut(copy: Path, kept: int) -> None:
    path = copy / "000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    index = INDEX_ENTRY.iter_unpack((copy / "000000.tar.index").read_bytes())
    lost = [n for n, (start, length, _) in enumerate(index) if start + length > len(data[:kept])]
    verdict = check(copy)
    assert not verdict.is_whole
    assert [number for _, number, _ in named(verdict)] == lost
    assert verdict.num_damaged == len(lost)


def test_what_is_missing_is_counted_and_what_is_extra_is_noted(copy: Path) -> None:
    (copy / "000000.tar").unlink()
    (copy / "000001.tar.index").unlink()
    shutil.copy(copy / "000002.tar", copy / "extra.tar")
    remote = RemoteFiles(RemoteConfig())
    verdict = verify(f"{copy}/{{000000..000002}}.tar", remote, "none")
    assert verdict.num_damaged == 8
    assert any("000000.tar is missing" in problem for problem in verdict.problems)
    assert any("000001.tar.index" in problem for problem in verdict.problems)
    assert f"{copy}/extra.tar is not in the manifest" in verdict.notes


def test_a_shard_that_is_gone_is_missed_by_a_glob_too(copy: Path) -> None:
    (copy / "000000.tar").unlink()
    verdict = check(copy)
    assert verdict.problems == [f"{copy}/000000.tar is missing"]
    assert verdict.num_damaged == 4


def test_shards_of_a_subset_are_no_problem(whole: Path) -> None:
    verdict = verify(f"{whole}/000001.tar", RemoteFiles(RemoteConfig()), "none")
    assert verdict.is_whole
    assert verdict.num_samples == 4
    assert verdict.notes == [f"2 other shards of {whole} were not asked for"]


SPOILT: dict[str, tuple[str, bytes, str]] = {
    "a truncated JPEG": ("jpg", jpeg(5)[:-200], "jpg"),
    "an empty image": ("jpg", b"", "jpg"),
    "a web page": ("jpg", b"<!DOCTYPE html><html></html>", "HTML"),
    "a PNG under a JPEG's name": ("jpg", mask((9, 9)), "PNG"),
    "no number": ("cls", b"cat", "not an integer"),
    "a label out of range": ("cls", b"3", "classes are 0 to 2"),
    "JSON that isn't": ("json", b"{", "json"),
    "a mask of another size": ("seg.png", mask((20, 17)), "the mask is 20x17, its image 20x16"),
    "a clip that isn't": ("mp4", b"\0\0\0\x18ftypmp42" + bytes(64), "mp4"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_contents_that_do_not_decode_are_found_though_every_checksum_is_right(tmp_path: Path, what: str) -> None:
    extension, content, cause = SPOILT[what]
    raw = samples()
    raw[5][extension] = content
    folder = write(tmp_path / "s", raw)
    verdict = check(folder)
    assert named(verdict) == [("000001.tar", 1, "k05")]
    assert cause in verdict.damaged[0].cause
    assert verdict.num_damaged == 1
    assert check(folder, decode=False).is_whole


def test_what_nobody_here_can_decode_is_counted(tmp_path: Path) -> None:
    raw = samples()
    for sample in raw:
        sample["flac"] = b"sound"
    verdict = check(write(tmp_path / "s", raw))
    assert verdict.is_whole
    assert ".flac files that were read but not decoded: 12" in verdict.notes


def test_a_file_that_nearly_all_others_have_is_missed(tmp_path: Path) -> None:
    raw = samples()
    del raw[7]["cls"]
    verdict = check(write(tmp_path / "s", raw))
    assert named(verdict) == [("000001.tar", 3, "k07")]
    assert verdict.damaged[0].cause == "it has no .cls; 11 of 12 samples have one"


def test_a_file_that_few_have_is_not_missed(tmp_path: Path) -> None:
    raw = samples()
    raw[7]["txt"] = b"a caption"
    assert check(write(tmp_path / "s", raw)).is_whole


def test_the_same_content_under_two_keys_is_noted(tmp_path: Path) -> None:
    raw = samples()
    raw[9]["jpg"] = raw[2]["jpg"]
    verdict = check(write(tmp_path / "s", raw))
    assert verdict.is_whole
    assert verdict.notes == ["samples with the same content as another: 1 (000002.tar sample 1 = 000000.tar sample 2)"]


def test_samples_that_were_left_out_knowingly_are_no_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    path = folder / "000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        start = file.getmembers()[2].offset
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    remote = RemoteFiles(RemoteConfig())
    index_folders([str(path) for path in sorted(folder.glob("*.tar"))], remote, skip_damaged=True)
    verdict = check(folder)
    assert verdict.is_whole
    assert verdict.num_samples == 11
    assert verdict.notes == [f"{path}: 1 damaged samples were left out when it was indexed"]


def test_a_manifest_written_by_hand_or_of_the_first_version_is_told(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "was changed by something that isn't swinv2-scale" in check(copy).problems[0]
    data = json.loads(path.read_text())
    data.pop("digest"), data.pop("schema")
    path.write_text(json.dumps(data | {"format": "swinv2_scale shards 1", "made_by": "me"}))
    verdict = check(copy)
    assert verdict.is_whole
    assert "has no digest" in verdict.notes[0]


def test_a_manifest_that_promises_too_much_is_a_problem(copy: Path) -> None:
    manifest = read_manifest(str(copy))
    entries = [
        entry.__class__(entry.name, entry.samples + 1, entry.bytes, entry.sha256) for entry in manifest.entries.values()
    ]
    write_manifest(copy, entries, manifest.made_by, manifest.schema)
    verdict = check(copy)
    assert len(verdict.problems) == 3
    assert verdict.num_damaged == 3
