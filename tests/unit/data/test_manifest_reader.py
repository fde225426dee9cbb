"""Shards: written, indexed, read back, and refused when damaged."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import webdataset

from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.manifest import (
    INDEX_ENTRY,
    ShardEntry,
    index_folder,
    index_location,
    read_manifest,
    sample_key,
    split_location,
    write_manifest,
)
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, expand_pattern, raise_file_problems, read_shard_set
from swinv2_scale.data.shards.writer import RawSample, write_shards
from swinv2_scale.errors import DataError, OutputError, SampleError
from tests.support.index_shard import index_shard

Member = tuple[str, bytes | None]


def tar_path(shards: ShardSet, number: int) -> Path:
    return Path(shards.locations[number])


def index_path(shards: ShardSet, number: int) -> Path:
    return Path(shards.index_locations[number])


def set_of(path: Path, entry: ShardEntry) -> ShardSet:
    return ShardSet((str(path),), (entry,), (index_location(str(path)),))


def raw_samples(count: int) -> list[RawSample]:
    """Samples of two files, of many lengths."""
    numbers = random.Random(4)
    return [
        {"__key__": f"sample{i:05d}", "bin": numbers.randbytes(numbers.randrange(1, 1500)), "cls": str(i).encode()}
        for i in range(count)
    ]


def write(folder: Path, count: int = 10, samples_per_shard: int = 4) -> ShardSet:
    write_shards(raw_samples(count), folder, samples_per_shard=samples_per_shard, made_by="a test")
    return read_shard_set(str(folder / "*.tar"))


def tar_of(path: Path, members: list[Member], fmt: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar by the standard library; None instead of bytes makes a directory."""
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read_all(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Index a tar and read every sample of it, last to first."""
    entry = index_shard(path)
    reader = ShardReader(set_of(path, entry))
    records = [reader.read(0, i) for i in reversed(range(entry.samples))][::-1]
    reader.close()
    return [(record.id.partition("/")[2], record.files) for record in records]


TWO_SAMPLES: list[Member] = [("a.txt", b"1" * 700), ("a.cls", b"0"), ("b.txt", b"2" * 100), ("b.cls", b"1")]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_to_the_byte_in_any_order(tmp_path: Path) -> None:
    samples = raw_samples(10)
    assert write_shards(iter(samples), tmp_path / "s", samples_per_shard=4, made_by="a test") == 10
    shards = read_shard_set(str(tmp_path / "s" / "*.tar"))
    assert shards.sizes == (4, 4, 2)
    assert shards.num_samples == 10
    reader = ShardReader(shards)
    for number in random.Random(0).sample(range(10), 10):
        record = reader.read(number // 4, number % 4)
        wanted = {name: value for name, value in samples[number].items() if name != "__key__"}
        assert record.files == wanted
        assert record.name.endswith(f"{number // 4:06d}.tar: {samples[number]['__key__']}")
    reader.close()


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one"), write(tmp_path / "two")
    for name in sorted(path.name for path in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert first.digest == second.digest


def test_the_digest_changes_with_any_sample(tmp_path: Path) -> None:
    samples = raw_samples(10)
    samples[7]["cls"] = b"8"
    write_shards(samples, tmp_path / "changed", samples_per_shard=4, made_by="a test")
    assert read_shard_set(str(tmp_path / "changed" / "*.tar")).digest != write(tmp_path / "s").digest


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        write_shards(raw_samples(2), folder, samples_per_shard=2, made_by="a test")
    assert [path.name for path in tmp_path.rglob("*")] == ["s", "mine.txt"]


def test_nothing_is_left_behind_when_the_samples_end_in_an_error(tmp_path: Path) -> None:
    def samples() -> Iterator[RawSample]:
        yield from raw_samples(5)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(samples(), tmp_path / "s", samples_per_shard=2, made_by="a test")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write"):
        write_shards(raw_samples(1), tmp_path / "file" / "s", samples_per_shard=2, made_by="a test")


def test_webdatasets_own_reader_reads_our_shards(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    read = webdataset.WebDataset(list(shards.locations), shardshuffle=False)
    found = [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in read
    ]
    assert found == raw_samples(10)


# --- indexing shards of others ----------------------------------------------------------------------------------------


def test_shards_by_webdataset_are_indexed_and_read(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for sample in raw_samples(6):
            tar.write(sample)
    wanted = [(f"{sample['__key__']}", {"bin": sample["bin"], "cls": sample["cls"]}) for sample in raw_samples(6)]
    assert read_all(path) == wanted


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_by_the_standard_library_are_indexed_and_read(tmp_path: Path, fmt: int) -> None:
    path = tar_of(tmp_path / "s.tar", [("d", None), ("d/a.png", b"one"), ("d/a.cls", b""), ("b.JPG", b"22")], fmt)
    assert read_all(path) == [("d/a", {"png": b"one", "cls": b""}), ("b", {"jpg": b"22"})]


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_whole(tmp_path: Path, fmt: int) -> None:
    keys = ["x" * 150, "d" * 120 + "/" + "y" * 130, "Zürich/" + "é" * 80]
    members: list[Member] = [(f"{key}.{end}", f"{key}{end}".encode()) for key in keys for end in ("txt", "cls")]
    found = read_all(tar_of(tmp_path / "s.tar", members, fmt))
    assert [name for name, _ in found] == [f"{key}" for key in keys]
    assert [files["txt"] for _, files in found] == [f"{key}txt".encode() for key in keys]


def test_directories_are_stepped_over_wherever_they_stand(tmp_path: Path) -> None:
    members: list[Member] = [("d/", None), ("d/a.txt", b"1"), ("e/", None), ("d/a.cls", b"2"), ("e/b.txt", b"3")]
    wanted = [("d/a", {"txt": b"1", "cls": b"2"}), ("e/b", {"txt": b"3"})]
    assert read_all(tar_of(tmp_path / "s.tar", members)) == wanted


def test_a_directory_may_be_the_last_member(tmp_path: Path) -> None:
    assert read_all(tar_of(tmp_path / "s.tar", [("a.txt", b"1"), ("d/", None)])) == [("a", {"txt": b"1"})]


@pytest.mark.parametrize("name", ["a.png", "a.seg.png", "d/a.b/c.txt", "d.e/a", "a", "d/.hidden", "x.tar.gz"])
def test_a_key_ends_at_the_first_dot_of_the_last_part_as_webdataset_has_it(name: str) -> None:
    prefix, _ = webdataset.tariterators.base_plus_ext(name)
    if prefix is not None:  # names without an extension are none of webdataset's samples
        assert sample_key(name) == prefix
    assert "." not in sample_key(name).rpartition("/")[2]


def test_an_index_holds_the_offset_length_and_checksum_of_each_sample(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    entry = index_shard(path)
    data = path.read_bytes()
    # Members: 512 of header each, contents rounded up to 512.
    ranges = [(0, 512 + 1024 + 512 + 512), (2560, 4 * 512)]
    wanted = [(start, length, zlib.crc32(data[start : start + length])) for start, length in ranges]
    assert list(INDEX_ENTRY.iter_unpack(path.with_name("s.tar.index").read_bytes())) == wanted
    assert (entry.name, entry.samples, entry.bytes) == ("s.tar", 2, len(data))


# --- damage found by indexing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 300, 511, 512, 700, 1535, 2000, 2560, 3000, 3583, 4096, 4607])
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path: Path, kept: int) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"s\.tar"):
        index_shard(path)


def test_a_tar_cut_at_the_border_of_a_member_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    with tarfile.open(path) as tar:
        borders = [member.offset for member in tar][1:]
    whole = path.read_bytes()
    for border in [*borders, 4608]:
        path.write_bytes(whole[:border])
        with pytest.raises(DataError, match=r"s\.tar is cut or damaged"):
            index_shard(path)


@pytest.mark.parametrize("member", [0, 1, 2, 3])
def test_one_flipped_byte_in_any_header_is_refused(tmp_path: Path, member: int) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[member].offset
    whole = path.read_bytes()
    for place in (0, 100, 124, 130, 148, 156, 257, 500):  # name, mode, size, checksum, type, magic, the rest
        data = bytearray(whole)
        data[start + place] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"s\.tar"):
            index_shard(path)


@pytest.mark.parametrize("member", [0, 1, 2, 3])
def test_a_header_overwritten_with_zeros_is_refused(tmp_path: Path, member: int) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    with tarfile.open(path) as tar:
        start = tar.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"s\.tar"):
        index_shard(path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(1000)])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar"):
        index_shard(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_link_or_a_device_is_refused_by_its_name(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        info = tarfile.TarInfo("b.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"'b\.txt' is no plain file"):
        index_shard(path)


def test_a_sparse_member_is_refused_or_read_right(tmp_path: Path) -> None:
    # As `tar --sparse` writes a file of 1 MB of zeros: its data in the tar are shorter than its size says.
    header = bytearray(tarfile.TarInfo("a.bin").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 2**20, b"%011o\0" % 0  # one piece: at the end, empty
    header[483:495] = b"%011o\0" % 2**20
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest = tar_of(tmp_path / "rest.tar", [("b.txt", b"2")]).read_bytes()
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(header) + rest)
    try:
        index_shard(path)
    except DataError:
        return  # said when the index is made, not when training reads it
    assert read_all(path) == [("a", {"bin": bytes(2**20)}), ("b", {"txt": b"2"})]


def test_samples_whose_files_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3"), ("b.cls", b"4")])
    with pytest.raises(DataError, match="'a'"):
        index_shard(path)


@pytest.mark.parametrize("between", [[], [("b.txt", b"2")]], ids=["adjacent", "apart"])
def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path, between: list[Member]) -> None:
    sample: list[Member] = [("a.txt", b"1"), ("a.cls", b"0")]
    path = tar_of(tmp_path / "s.tar", [*sample, *between, ("a.txt", b"another"), ("a.cls", b"1")])
    with pytest.raises(DataError, match="'a'"):
        index_shard(path)


# --- damage found later -----------------------------------------------------------------------------------------------


def test_missing_and_truncated_files_are_named_all_at_once(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    raise_file_problems(shards.file_problems())
    tar_path(shards, 0).unlink()
    tar_path(shards, 1).write_bytes(tar_path(shards, 1).read_bytes()[:-1])
    index_path(shards, 2).unlink()
    with pytest.raises(DataError) as caught:
        raise_file_problems(shards.file_problems())
    message = str(caught.value)
    assert f"{tar_path(shards, 0)} is missing" in message
    assert f"{tar_path(shards, 1)} has " in message
    assert f"{index_path(shards, 2)} is missing" in message
    assert "3 shard files" in message


def test_reading_from_a_shard_that_is_gone_or_cut_is_a_data_error(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    tar_path(shards, 0).unlink()
    tar_path(shards, 1).write_bytes(tar_path(shards, 1).read_bytes()[:600])
    for shard in (0, 1):
        with pytest.raises(DataError, match=tar_path(shards, shard).name):
            ShardReader(shards).read(shard, 3)


def test_any_flipped_byte_inside_a_sample_is_found_and_its_neighbours_stay_readable(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", count=3, samples_per_shard=3)
    path = tar_path(shards, 0)
    whole = path.read_bytes()
    start, length, _ = INDEX_ENTRY.unpack_from(index_path(shards, 0).read_bytes(), INDEX_ENTRY.size)
    for place in [*range(start, start + length, 97), start + length - 1]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        reader = ShardReader(shards)
        with pytest.raises(DataError, match=r"000000\.tar: sample 1 .* is damaged"):
            reader.read(0, 1)
        assert reader.read(0, 0).id.endswith("sample00000")
        assert reader.read(0, 2).id.endswith("sample00002")
        reader.close()


def test_any_flipped_bit_of_an_index_entry_is_found(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", count=3, samples_per_shard=3)
    path = index_path(shards, 0)
    whole = path.read_bytes()
    for bit in range(8 * INDEX_ENTRY.size):
        data = bytearray(whole)
        data[INDEX_ENTRY.size + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        reader = ShardReader(shards)
        with pytest.raises(DataError, match=r"000000\.tar"):
            reader.read(0, 1)
        reader.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("shards 2", "shards 3"),
        lambda text: text.replace('"samples"', '"sample"'),
        lambda text: text.replace('"samples": 4', '"samples": 3', 1),
        lambda text: text.replace("a test", "a text"),
        lambda text: text.replace('"digest": "', '"digest": "0'),
    ],
)
def test_a_spoilt_manifest_is_a_data_error_that_names_it(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    write(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(spoil(manifest.read_text()))
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_shard_set(str(tmp_path / "s" / "*.tar"))


def test_a_manifest_is_plain_json_with_one_entry_a_shard(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    data = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [item["name"] for item in data["shards"]] == ["000000.tar", "000001.tar", "000002.tar"]
    assert data["made_by"] == {"command": "a test"}
    assert tuple(read_manifest(str(tmp_path / "s")).entries.values()) == shards.entries


def test_a_manifest_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({"format": "swinv2_scale shards 1", "made_by": "a test", "shards": data["shards"]}))
    assert read_shard_set(str(tmp_path / "s" / "*.tar")) == shards


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_at_nine_tenths_of_an_epoch_reads_one_index_entry_and_one_sample(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", count=400, samples_per_shard=4)
    assert len(shards.locations) == 100
    place = Order.of(shards.sizes, 0, True, 64).locate(int(0.9 * shards.num_samples))
    reader = ShardReader(shards)
    record = reader.read(place.shard, place.sample)
    with tarfile.open(tar_path(shards, place.shard)) as tar:
        first, last = tar.getmembers()[2 * place.sample : 2 * place.sample + 2]  # two files a sample
    end = last.offset_data + last.size + -last.size % 512
    assert record.id.endswith(first.name.removesuffix(".bin"))
    assert reader.bytes_read == 24 + end - first.offset
    assert reader.bytes_read < shards.num_bytes / 200
    reader.close()


def test_a_reader_of_many_shards_keeps_a_bounded_number_of_files_open(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", count=200, samples_per_shard=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(shards)
    for shard in [*range(200), 0, 199]:
        assert reader.read(shard, 0).files["cls"] == str(shard).encode()
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 130
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- patterns ---------------------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_braces_globs_lists_and_double_colons_name_the_same_shards(tmp_path: Path) -> None:
    paths = touch(tmp_path / "a", "000.tar", "001.tar", "002.tar")
    other = touch(tmp_path / "b", "x.tar")
    folder = tmp_path / "a"
    paths, other = ([str(path) for path in found] for found in (paths, other))
    assert expand_pattern(f"{folder}/{{000..002}}.tar") == paths
    assert expand_pattern(f"{folder}/*.tar") == paths
    assert expand_pattern(f"{folder}/00[01].tar") == paths[:2]
    assert expand_pattern(paths[1]) == [paths[1]]
    assert expand_pattern(f"{folder}/*.tar::{tmp_path}/b/x.tar") == paths + other
    assert expand_pattern([f"{folder}/{{000..001}}.tar", f"{folder}/002.tar::{tmp_path}/b/*.tar"]) == paths + other


def test_braces_keep_shards_that_are_missing_so_that_checking_names_them(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    tar_path(shards, 1).unlink()
    named = read_shard_set(f"{tmp_path}/s/{{000000..000002}}.tar")
    with pytest.raises(DataError, match=r"000001\.tar is missing"):
        raise_file_problems(named.file_problems())


def test_a_glob_misses_no_shard_that_its_manifest_knows(tmp_path: Path) -> None:
    whole = write(tmp_path / "s")
    tar_path(whole, 1).unlink()
    found = read_shard_set(f"{tmp_path}/s/*.tar")
    assert found == whole
    with pytest.raises(DataError, match=r"000001\.tar is missing"):
        raise_file_problems(found.file_problems())
    assert len(read_shard_set(f"{tmp_path}/s/00000[02].tar").locations) == 2


def test_a_disk_that_cannot_be_read_at_the_moment_is_no_damage(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = ShardReader(shards)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(DataError, match="Too many open files") as caught:
            reader.read(0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(caught.value, SampleError)
    assert reader.read(0, 0).key == "sample00000"
    reader.close()


@pytest.mark.parametrize("pattern", ["none-*.tar", "none-{00..03}.tar", "none.tar"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path / "a", "000.tar")
    for asked in (f"{tmp_path}/{pattern}", f"{tmp_path}/a/*.tar::{tmp_path}/{pattern}"):
        with pytest.raises(DataError) as caught:
            expand_pattern(asked)
        assert pattern in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("https://example.org/a/{00..01}.tar", ["https://example.org/a/00.tar", "https://example.org/a/01.tar"]),
        ("s3://b/x-{7..8}.tar::/data/none", None),
        (
            "pipe:aws s3 cp s3://laion/{00000..00001}.tar -::pipe:cat x.tar",
            ["pipe:aws s3 cp s3://laion/00000.tar -", "pipe:aws s3 cp s3://laion/00001.tar -", "pipe:cat x.tar"],
        ),
    ],
)
def test_open_clips_shard_strings_are_read_as_they_are(pattern: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match="no shards match '/data/none'"):
            expand_pattern(pattern)
    else:
        assert expand_pattern(pattern) == expected


@pytest.mark.parametrize(
    ("location", "folder", "name"),
    [
        ("/data/a/000.tar", "/data/a", "000.tar"),
        ("000.tar", ".", "000.tar"),
        ("https://host/d/000.tar?token=a/b.tar", "https://host/d", "000.tar"),
        ("pipe:aws s3 cp s3://b/d/000.tar -", "pipe:aws s3 cp s3://b/d/ -", "000.tar"),
        ("pipe:curl -s 'https://h/000.tar'", "pipe:curl -s 'https://h/'", "000.tar"),
    ],
)
def test_a_location_is_split_into_its_folder_and_name(location: str, folder: str, name: str) -> None:
    assert split_location(location) == (folder, name)


def test_shards_whose_folder_cannot_be_written_have_their_manifest_in_the_index_folder(tmp_path: Path) -> None:
    shards = write(tmp_path / "s")
    apart = index_folder(str(tmp_path / "indexes"), str(tmp_path / "s"))
    apart.mkdir(parents=True)
    for path in (tmp_path / "s").iterdir():
        if path.suffix != ".tar":
            path.rename(apart / path.name)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        read_shard_set(f"{tmp_path}/s/*.tar")
    found = read_shard_set(f"{tmp_path}/s/*.tar", index_dir=str(tmp_path / "indexes"))
    assert found.entries == shards.entries
    raise_file_problems(found.file_problems())
    reader = ShardReader(found)
    assert reader.read(1, 2).files["cls"] == b"6"
    reader.close()


def test_shards_without_a_manifest_or_not_in_it_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "s.tar", TWO_SAMPLES)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        read_shard_set(str(path))
    write_manifest(tmp_path, [ShardEntry("other.tar", 1, 1, "")], "a test")
    with pytest.raises(DataError, match=r"doesn't list s\.tar"):
        read_shard_set(str(path))
    write_manifest(tmp_path, [index_shard(path)], "a test")
    assert read_shard_set(str(path)).num_samples == 2


def test_ids_are_unique_when_shards_of_two_folders_have_the_same_names(tmp_path: Path) -> None:
    write(tmp_path / "one", count=2)
    write(tmp_path / "two", count=2)
    shards = read_shard_set(f"{tmp_path}/one/*.tar::{tmp_path}/two/*.tar")
    reader = ShardReader(shards)
    ids = [reader.read(shard, sample).id for shard in (0, 1) for sample in (0, 1)]
    reader.close()
    assert len(set(ids)) == 4
