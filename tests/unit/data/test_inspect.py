"""Statistics, contact sheets and folders made of shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.inspection.contact_sheet import draw_contact_sheet, thumbnail
from swinv2_scale.data.inspection.export import export_folder
from swinv2_scale.data.inspection.stats import Stats, collect_stats
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.folder_index import index_folders
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.data.shards.writer import RawSample, write_shards
from swinv2_scale.errors import DataError, OutputError, SampleError
from tests.support.pictures import encoded

REMOTE = RemoteFiles(RemoteConfig())
CLASSES = ["n01", "n02", "n03"]


def image(size: tuple[int, int], colour: str = "white", kind: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(Image.new("RGB", size, colour), kind, **({"exif": exif} if orientation > 1 else {}))


def samples(count: int = 60) -> list[RawSample]:
    return [{"__key__": f"k{i:02d}", "png": image((10 + i, 100)), "cls": str(i % 3).encode()} for i in range(count)]


def write(folder: Path, raw: list[RawSample], **schema: list[str]) -> str:
    write_shards(raw, folder, samples_per_shard=7, made_by="a test", schema=dict(schema))
    return f"{folder}/*.tar"


def stats_of(pattern: str, max_samples: int | None = None, seed: int = 0) -> Stats:
    return collect_stats(pattern, REMOTE, "none", max_samples, seed)


# --- stats ------------------------------------------------------------------------------------------------------------


def test_all_samples_are_counted(tmp_path: Path) -> None:
    raw = samples()
    found = stats_of(write(tmp_path / "s", raw, classes=CLASSES))
    assert (found.samples, found.shards, found.looked_at, found.unreadable) == (60, 9, 60, 0)
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    assert found.members == {"png": 60, "cls": 60}
    assert found.formats == {"PNG": 60}
    assert found.modes == {"RGB": 60}
    assert found.labels == {"n01": 20, "n02": 20, "n03": 20}
    widths = [10 + i for i in range(60)]
    assert found.quantiles["width, px"] == np.percentile(widths, (0, 5, 25, 50, 75, 95, 100)).round(1).tolist()
    assert found.quantiles["bytes"][-1] == max(len(sample["png"]) for sample in raw)
    assert sum(found.sizes.values()) == 60
    for name, count in found.sizes.items():
        least, most = map(int, name.split("-"))
        assert count == sum(least <= width <= most for width in widths)


def test_a_bounded_number_is_drawn_from_all_shards_by_the_seed(tmp_path: Path) -> None:
    pattern = write(tmp_path / "s", [s | {"cls": str(i).encode()} for i, s in enumerate(samples())])
    first, again, other = stats_of(pattern, 20), stats_of(pattern, 20), stats_of(pattern, 20, seed=1)
    assert first == again
    assert first.labels != other.labels
    assert (first.samples, first.looked_at, sum(first.labels.values())) == (60, 20, 20)
    assert len({int(label) // 7 for label in first.labels}) > 5  # of 9 shards


def test_words_for_people_count_before_class_folders(tmp_path: Path) -> None:
    pattern = write(tmp_path / "s", samples(3), classes=CLASSES, class_names=["tench", "goldfish", "shark"])
    assert set(stats_of(pattern).labels) == {"tench", "goldfish", "shark"}


def test_a_picture_is_measured_as_a_person_sees_it(tmp_path: Path) -> None:
    raw: list[RawSample] = [{"__key__": "a", "jpg": image((30, 20), kind="JPEG", orientation=6)}]
    found = stats_of(write(tmp_path / "s", raw))
    assert (found.quantiles["width, px"][0], found.quantiles["height, px"][0]) == (20, 30)


def test_damaged_and_unlabelled_samples_are_counted_not_fatal(tmp_path: Path) -> None:
    raw = samples(5)
    raw[1]["png"] = b"<html>"
    raw[2]["cls"] = b"cat"
    pattern = write(tmp_path / "s", raw)
    path = tmp_path / "s" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the first sample
    path.write_bytes(data)
    found = stats_of(pattern)
    assert (found.looked_at, found.unreadable) == (5, 1)
    assert found.formats == {"PNG": 3}
    assert sum(found.labels.values()) == 3


# --- contact sheets ---------------------------------------------------------------------------------------------------


def sheet_of(pattern: str, path: Path, **options: int) -> Image.Image:
    draw_contact_sheet(pattern, REMOTE, "none", path, **options)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return sheet.convert("RGB")


def test_a_sheet_shows_each_drawn_sample_once_and_is_the_same_each_time(tmp_path: Path) -> None:
    colours = ["#d00000", "#00d000", "#0000d0", "#d0d000", "#00d0d0", "#d000d0"]
    raw: list[RawSample] = [{"__key__": c[1:], "png": image((64, 64), c)} for c in colours]
    pattern = write(tmp_path / "s", raw)
    sheet = sheet_of(pattern, tmp_path / "a.png", rows=3, columns=2)
    pixels = Counter(sheet.getdata())
    for colour in colours:
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert pixels[rgb] == 128 * 128
    sheet_of(pattern, tmp_path / "b.png", rows=3, columns=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    fewer = sheet_of(pattern, tmp_path / "c.png", rows=1, columns=2)
    assert fewer.height < sheet.height
    assert sum(Counter(fewer.getdata())[tuple(int(c[i : i + 2], 16) for i in (1, 3, 5))] > 0 for c in colours) == 2


def test_a_sheet_of_hostile_and_broken_samples_is_drawn_all_the_same(tmp_path: Path) -> None:
    boxes = [[0, 0, 1e300, 5], [-5, -5, 3, 3], [1, 2, 3], "text", [float("nan")] * 4]
    raw: list[RawSample] = [
        {"__key__": "../../x\udcff" + "y" * 300, "png": b"<html>", "cls": b"-3"},
        {"__key__": "c", "txt": b"1"},
        {"__key__": "d", "png": image((1, 500)), "json": b"[" * 100_000},
        {"__key__": "e", "mp4": b"none"},
        {"__key__": "f", "png": image((40, 30)), "seg.png": b"broken"},
    ]
    for i, box in enumerate(boxes):
        content = json.dumps({"annotations": [{"category_id": 1, "bbox": box}]}).encode()
        raw.append({"__key__": f"box{i}", "png": image((40, 30)), "json": content})
    for i, category in enumerate((10**400, float("inf"), "text")):
        content = json.dumps({"annotations": [{"category_id": category, "bbox": [1, 1, 5, 5]}]}).encode()
        raw.append({"__key__": f"category{i}", "png": image((40, 30)), "json": content})
    path = tmp_path / "s" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for sample in raw:
            for extension, content in list(sample.items())[1:]:
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                assert isinstance(content, bytes)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    index_folders([str(path)], REMOTE)
    assert sheet_of(str(path), tmp_path / "sheet.png", rows=3, columns=5).width > 600


def test_thumbnails_are_upright(tmp_path: Path) -> None:
    record = Record("", "a", {"jpg": image((300, 200), kind="JPEG", orientation=6)})
    assert thumbnail(record).size == (85, 128)


def test_a_mask_colours_its_classes_and_leaves_zero_clear() -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[:64], mask[64:, :64] = 1, 2
    small = np.asarray(thumbnail(Record("", "a", {"png": image((128, 128)), "seg.png": encoded(mask, "PNG")})))
    assert (small[100, 100] == 255).all()
    assert len(np.unique(small.reshape(-1, 3), axis=0)) == 3


def test_boxes_are_drawn_where_coco_says() -> None:
    content = json.dumps({"annotations": [{"category_id": 3, "bbox": [64, 32, 128, 64]}]}).encode()
    small = np.asarray(thumbnail(Record("", "a", {"png": image((256, 256)), "json": content})))
    rows, columns = np.nonzero((small != 255).any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 48, 32, 96)


def test_a_sample_without_an_image_has_no_thumbnail() -> None:
    with pytest.raises(SampleError, match="no image"):
        thumbnail(Record("", "a", {"txt": b"1"}))


def test_the_first_frame_stands_for_a_clip() -> None:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (200, 20, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    small = thumbnail(Record("", "a", {"mp4": buffer.getvalue()}))
    assert small.size == (128, 96)
    assert abs(float(np.asarray(small).mean()) - 200) < 5  # what MPEG-4 loses


def test_a_sheet_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    pattern = write(tmp_path / "s", samples(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        draw_contact_sheet(pattern, REMOTE, "none", tmp_path / "file" / "sheet.png")


# --- export -----------------------------------------------------------------------------------------------------------


def export(pattern: str, destination: Path) -> int:
    return export_folder(pattern, REMOTE, "none", destination)


def test_a_folder_has_class_folders_and_every_byte(tmp_path: Path) -> None:
    raw = samples(20)
    raw[4]["__key__"] = "n02/inside"  # in its class folder already
    raw[5] = {"__key__": "unlabelled", "seg.png": b"1", "json": b"{}"}
    pattern = write(tmp_path / "s", raw, classes=CLASSES, class_names=["tench", "goldfish", "shark"])
    assert export(pattern, tmp_path / "out") == 20
    wanted = {}
    for i, sample in enumerate(raw):
        key = str(sample["__key__"])
        folder = "" if i in (4, 5) else f"n0{i % 3 + 1}/"
        wanted |= {f"{folder}{key}.{e}": content for e, content in sample.items() if e != "__key__"}
    out = tmp_path / "out"
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/absolute/x", "a//x", "./x", "n" * 300, "a\0b", "d/" * 10 + "../x"]
)
@pytest.mark.parametrize("label", [True, False])
def test_a_name_that_would_lead_out_of_the_folder_is_refused(tmp_path: Path, key: str, label: bool) -> None:
    path = tmp_path / "s" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in [(f"{key}.txt", b"1"), *([(f"{key}.cls", b"0")] if label else [])]:
            info = tarfile.TarInfo("x" if "\0" in name else name)
            info.pax_headers = {"path": name}
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    index_folders([str(path)], REMOTE)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(DataError, match="a name that no file may have"):
        export(str(path), tmp_path / "out")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("classes", [["..", "a"], ["/", "a"], ["a/../..", "b"], ["\0", "a"], ["", "a"]])
def test_class_names_do_not_lead_out_of_the_folder_either(tmp_path: Path, classes: list[str]) -> None:
    pattern = write(
        tmp_path / "s", [{"__key__": "../x" if classes[0] == "/" else "x", "txt": b"1", "cls": b"0"}], classes=classes
    )
    try:
        export(pattern, tmp_path / "deep" / "out")
    except DataError:
        assert not list((tmp_path / "deep").iterdir())
    else:
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "s"}


def test_two_samples_with_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", samples(2))
    write(tmp_path / "b", samples(2))
    with pytest.raises(DataError, match="another sample has a file"):
        export(f"{tmp_path}/a/*.tar::{tmp_path}/b/*.tar", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_existing_folder_or_link_is_refused_and_left_alone(tmp_path: Path) -> None:
    pattern = write(tmp_path / "s", samples(2))
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for name in ("out", "link"):
        with pytest.raises(OutputError, match="exists already"):
            export(pattern, tmp_path / name)
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_sample_leaves_no_folder(tmp_path: Path) -> None:
    pattern = write(tmp_path / "s", samples(3))
    path = tmp_path / "s" / "000000.tar"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        export(pattern, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
