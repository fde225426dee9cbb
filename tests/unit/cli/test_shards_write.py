"""``swinv2-scale shards write``: every layout into shards that anyone reads, damage found, options that are checked."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from PIL import Image

from swinv2_scale.data.shards.manifest import read_manifest
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from tests.unit.cli.photos import SHARD, digests, make_photos, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("source") / "photos")


def read_back(folder: Path) -> dict[str, dict[str, bytes]]:
    shards = read_shard_set(str(folder / "*.tar"))
    reader = ShardReader(shards)
    records = [reader.read(shard, index) for shard, size in enumerate(shards.sizes) for index in range(size)]
    reader.close()
    return {record.key: record.files for record in records}


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_image_is_in_the_shards_with_its_bytes_its_class_and_a_name_to_know_it_by(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(source, tmp_path / "s", *SHARD) == 0
    paths = sorted(source.rglob("*.jpg"))
    wanted = {
        str(path.relative_to(source)).removesuffix(".jpg").replace(".", "_"): {
            "jpg": path.read_bytes(),
            "cls": path.parent.name[-1].encode(),
        }
        for path in paths
    }
    assert read_back(tmp_path / "s") == wanted
    read = webdataset.WebDataset(sorted(map(str, tmp_path.glob("s/*.tar"))), shardshuffle=False, empty_check=False)
    assert {item["__key__"]: {"jpg": item["jpg"], "cls": item["cls"]} for item in read} == wanted
    output = capsys.readouterr().out
    assert "1 files were left out because of their extension: 1 .txt" in output
    assert f"30 samples in 8 shards, 0.1 MiB, in {tmp_path}/s" in output
    assert f"use data.train={tmp_path}/s/*.tar" in output


def test_the_manifest_says_what_is_in_the_shards_and_how_they_were_made(source: Path, tmp_path: Path) -> None:
    assert write(source, tmp_path / "s", "--short-side", "20", "--seed", "5") == 0
    manifest = read_manifest(str(tmp_path / "s"))
    assert manifest.schema == {
        "classes": ["class 0", "class 1", "class 2"],
        "members": {"cls": 30, "jpg": 30},
        "labels": {"samples": 30, "smallest": 0, "largest": 2, "others": 0},
    }
    told = manifest.made_by
    assert (told["layout"], told["source"], told["split"]) == ("imagefolder", "photos", None)
    assert (told["short_side"], told["quality"], told["seed"], told["verify"]) == (20, 92, 5, True)
    assert str(source) not in json.dumps(told)  # else the same data in another place would make other bytes


@pytest.mark.parametrize(
    "options", [(), ("--short-side", "20"), ("--no-shuffle", "--bytes-per-shard", "40KiB")], ids=str
)
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for processes in ("1", "3"):
        assert write(source, tmp_path / processes, *SHARD, *options, "--processes", processes) == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def test_classes_are_mixed_unless_the_sources_order_is_asked_for(source: Path, tmp_path: Path) -> None:
    def classes(*options: str) -> list[str]:
        folder = tmp_path / "-".join(("s", *options))
        assert write(source, folder, "--samples-per-shard", "10", *options) == 0
        return [files["cls"].decode() for files in read_back(folder).values()]

    kept, shuffled, otherwise = classes("--no-shuffle"), classes(), classes("--seed", "1")
    assert kept == sorted(kept)
    assert sorted(shuffled) == sorted(otherwise) == kept
    assert shuffled != otherwise
    assert all(set(shuffled[start : start + 10]) == {"0", "1", "2"} for start in (0, 10, 20))


def test_shards_end_at_the_bytes_that_were_asked_for(source: Path, tmp_path: Path) -> None:
    assert write(source, tmp_path / "s", "--bytes-per-shard", "0.03MiB") == 0
    sizes = [path.stat().st_size for path in tmp_path.glob("s/*.tar")]
    assert len(sizes) > 3
    assert max(sizes) <= 0.03 * 2**20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bytes-per-shard", "10 apples"), "10 apples"),
        (("--bytes-per-shard", "0"), "'0'"),
        (("--quality", "92"), "--short-side"),
        (("--short-side", "20", "--quality", "99"), "99"),
        (("--split", "train"), "no splits"),
        (("--samples-per-shard", "0"), "0 is less than 1"),
        (("--no-shuffle", "--seed", "3"), "not allowed with"),
    ],
)
def test_an_option_that_makes_no_sense_ends_with_78(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    try:
        code = write(source, tmp_path / "s", *options)
    except SystemExit as ending:
        code = int(ending.code or 0)
    assert code == 78
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- layouts ----------------------------------------------------------------------------------------------------------


def jpeg(path: Path, size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(path)


def by_webdataset(folder: Path) -> dict[str, dict[str, bytes]]:
    read = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, empty_check=False)
    return {item["__key__"]: {name: value for name, value in item.items() if name[:2] != "__"} for item in read}


def test_coco_is_written_with_its_annotations(tmp_path: Path) -> None:
    jpeg(tmp_path / "coco" / "val2017" / "000000000139.jpg")
    data = {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "width": 30, "height": 20}],
        "annotations": [{"id": 1, "image_id": 139, "category_id": 64, "bbox": [1.5, 2, 3, 4]}],
        "categories": [{"id": 64, "name": "potted plant"}],
    }
    (tmp_path / "coco" / "annotations").mkdir()
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    assert write(tmp_path / "coco", tmp_path / "s", "--from", "coco", "--split", "validation") == 0
    (files,) = by_webdataset(tmp_path / "s").values()
    assert sorted(files) == ["jpg", "json"]
    assert json.loads(files["json"])["annotations"] == data["annotations"]
    assert read_manifest(str(tmp_path / "s")).schema["categories"] == data["categories"]


@pytest.mark.parametrize(("options", "size"), [((), (30, 20)), (("--short-side", "10"), (15, 10))])
def test_ade20k_is_written_with_masks_that_fit_their_images(
    tmp_path: Path, options: tuple[str, ...], size: tuple[int, int]
) -> None:
    root = tmp_path / "ADEChallengeData2016"
    jpeg(root / "images" / "training" / "ADE_train_00000001.jpg")
    (root / "annotations" / "training").mkdir(parents=True)
    Image.fromarray(np.full((20, 30), 150, np.uint8)).save(root / "annotations/training/ADE_train_00000001.png")
    assert write(tmp_path, tmp_path / "s", "--from", "ade20k", *options) == 0
    files = by_webdataset(tmp_path / "s")["training/ADE_train_00000001"]
    images = {name: Image.open(io.BytesIO(content)) for name, content in files.items()}
    assert {name: image.size for name, image in images.items()} == {"jpg": size, "seg.png": size}
    assert np.all(np.asarray(images["seg.png"]) == 150)


def test_kinetics_is_written_with_the_clips_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k" / "train").mkdir(parents=True)
    clip = tmp_path / "k" / "train" / "abc_000001_000011.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"  # type: ignore[attr-defined]
        for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))):  # type: ignore[attr-defined]
            container.mux(packet)
        container.mux(stream.encode(None))  # type: ignore[attr-defined]
    header = "label,youtube_id,time_start,time_end,split"
    (tmp_path / "k" / "train.csv").write_text(f"{header}\nzumba,abc,1,11,train\nabseiling,gone,0,10,train\n")
    assert write(tmp_path / "k", tmp_path / "s", "--from", "kinetics") == 0
    assert "1 of 2 clips of train.csv are not there" in capsys.readouterr().out
    files = by_webdataset(tmp_path / "s")["abc_000001_000011"]
    assert (files["mp4"], files["cls"]) == (clip.read_bytes(), b"1")


def test_imagenet_is_written_though_one_of_its_jpegs_is_a_png(tmp_path: Path) -> None:
    jpeg(tmp_path / "i" / "train" / "n01440764" / "n01440764_18.JPEG")
    odd = tmp_path / "i" / "train" / "n02105855" / "n02105855_2933.JPEG"
    odd.parent.mkdir()
    Image.new("RGB", (9, 9)).save(odd, "PNG")
    assert write(tmp_path / "i", tmp_path / "s", "--from", "imagenet") == 0
    found = by_webdataset(tmp_path / "s")
    assert {key: sorted(files) for key, files in found.items()} == {
        "n01440764/n01440764_18": ["cls", "jpg"],
        "n02105855/n02105855_2933": ["cls", "png"],
    }


def test_a_table_of_files_with_names_of_all_kinds_is_written(tmp_path: Path) -> None:
    names = ["a b/ö 長.jpg", "a b/ö 長.x.jpg", "dot.ted/" + "n" * 200 + ".jpg", os.fsdecode(b"caf\xe9/x.jpg")]
    for name in names:
        jpeg(tmp_path / "t" / name)
    text = "path,label\n" + "".join(f'"{name}",{number}\n' for number, name in enumerate(names))
    (tmp_path / "t" / "table.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert write(tmp_path / "t" / "table.csv", tmp_path / "s", "--from", "csv", "--no-shuffle") == 0
    found = by_webdataset(tmp_path / "s")
    assert list(found) == ["a b/ö 長", "a b/ö 長_x", "dot_ted/" + "n" * 200, "caf%E9/x"]
    assert [files["cls"] for files in found.values()] == [b"0", b"1", b"2", b"3"]
    assert read_back(tmp_path / "s") == found


# --- damaged samples --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    (folder / "class 1" / "01.v1.jpg").write_bytes(b"")
    (folder / "class 2" / "bad.png").write_bytes(b"<html>")
    cut = folder / "class 0" / "12.v1.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    return folder


def test_the_first_damaged_file_ends_the_command_and_going_on_without_such_files_is_one_option_away(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(damaged, tmp_path / "s", *SHARD, "--processes", "2") == 65
    error = capsys.readouterr().err
    assert "--resume --skip-damaged" in error
    assert any(
        name in error
        for name in (
            "01.v1.jpg: doesn't decode: it is empty",
            "bad.png: doesn't decode: it is an HTML",
            "12.v1.jpg: doesn't",
        )
    )
    assert not (tmp_path / "s").exists()
    assert write(damaged, tmp_path / "s", *SHARD, "--resume", "--skip-damaged") == 0
    output = capsys.readouterr().out
    assert "28 samples" in output
    assert f"3 damaged samples were left out: {tmp_path}/s/rejected.jsonl" in output
    rejected = [json.loads(line) for line in (tmp_path / "s" / "rejected.jsonl").read_text().splitlines()]
    assert {item["path"] for item in rejected} == {"class 1/01.v1.jpg", "class 2/bad.png", "class 0/12.v1.jpg"}
    assert len(read_back(tmp_path / "s")) == 28
    assert write(damaged, tmp_path / "t", *SHARD, "--skip-damaged") == 0
    assert digests(tmp_path / "s") == digests(tmp_path / "t")


def test_unverified_samples_are_taken_if_they_begin_as_images(damaged: Path, tmp_path: Path) -> None:
    assert write(damaged, tmp_path / "s", "--no-verify", "--skip-damaged") == 0
    assert len(read_back(tmp_path / "s")) == 29  # with the one that is cut


def test_a_source_without_a_whole_sample_makes_no_shards(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    assert write(tmp_path / "bad", tmp_path / "s", "--skip-damaged") == 65
    assert not (tmp_path / "s").exists()
