"""What becomes of a source's files: bytes kept or made smaller, damage found and named before it is in a shard."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from swinv2_scale.data.sources.listing import Item
from swinv2_scale.data.sources.preparation import Rejected, Treatment, prepare
from swinv2_scale.errors import ConfigError, DataError
from tests.support.pictures import encoded, npy

KEPT = Treatment()
UNREAD = Treatment(verify=False)


def smooth(width: int, height: int) -> NDArray[np.uint8]:
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    return np.stack(
        [np.tile(x, (height, 1)), np.tile(y[:, None], (1, width)), np.full((height, width), 99)], -1
    ).astype(np.uint8)


def prepared(
    tmp_path: Path, treatment: Treatment, *files: tuple[str, bytes], max_mask_value: int = 255
) -> dict[str, bytes] | Rejected:
    """Members by extension."""
    for name, content in files:
        (tmp_path / name).write_bytes(content)
    item = Item("key", tuple(name for name, _ in files), 7, b'{"a":1}')
    found = prepare(item, tmp_path, treatment, max_mask_value)
    if isinstance(found, Rejected):
        return found
    with tarfile.open(fileobj=io.BytesIO(found + bytes(1024))) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert members.pop("key.cls") == b"7"
    assert json.loads(members.pop("key.json")) == {"a": 1}
    return {name.removeprefix("key."): content for name, content in members.items()}


def image_of(found: dict[str, bytes] | Rejected) -> Image.Image:
    assert isinstance(found, dict), found
    assert list(found) == ["jpg"]
    return Image.open(io.BytesIO(found["jpg"]))


JPEG = encoded(smooth(60, 40), "JPEG", quality=95)
PNG = encoded(smooth(60, 40), "PNG")
NPY = npy(np.ones((4, 5, 7), np.float32))
TIFF = io.BytesIO()
tifffile.imwrite(TIFF, np.zeros((9, 8, 6), np.uint16), photometric="minisblack", planarconfig="contig")


def clip(frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"  # type: ignore[attr-defined]
        noise = np.random.default_rng(0)
        for _ in range(frames):
            pixels = noise.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))  # type: ignore[attr-defined]
        container.mux(stream.encode(None))  # type: ignore[attr-defined]
    return buffer.getvalue()


CLIP = clip(12)


# --- kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("treatment", [KEPT, UNREAD], ids=["verified", "unread"])
@pytest.mark.parametrize(
    ("name", "content", "extension"),
    [
        ("x.JPEG", JPEG, "jpg"),
        ("x.jpeg", PNG, "png"),  # as one image of ImageNet
        ("x.png", PNG, "png"),
        ("x.webp", encoded(smooth(6, 4), "WEBP"), "webp"),
        ("x.gif", encoded(Image.new("P", (4, 4)), "GIF"), "gif"),
        ("x.bmp", encoded(smooth(6, 4), "BMP"), "bmp"),
        ("x.tif", encoded(smooth(6, 4), "TIFF"), "tiff"),
        ("x.tiff", TIFF.getvalue(), "tiff"),  # six channels
        ("x.npy", NPY, "npy"),
        ("x.mp4", CLIP, "mp4"),
        ("x.jpg", encoded(Image.new("CMYK", (9, 9)), "JPEG"), "jpg"),
        ("x.png", encoded(Image.new("I;16", (9, 9)), "PNG"), "png"),
    ],
)
def test_a_whole_file_keeps_its_bytes_and_is_called_after_its_content(
    tmp_path: Path, treatment: Treatment, name: str, content: bytes, extension: str
) -> None:
    assert prepared(tmp_path, treatment, (name, content)) == {extension: content}


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jpg", b"", "it is empty"),
        ("a.jpg", b"<!DOCTYPE html><html>404</html>", "it is an HTML page, not"),
        ("a.jpg", JPEG[:-100], "truncated"),
        ("a.png", PNG[:-20], "doesn't decode"),
        ("a.png", PNG[:60] + bytes(40) + PNG[100:], "doesn't decode"),
        ("a.jpg", b"\x89HDF no image at all", "doesn't start as an image does"),
        ("a.jpg", encoded(Image.new("1", (12_000, 12_000)), "PNG"), "144,000,000 pixels"),
        ("a.npy", NPY[:-1], "doesn't decode"),
        ("a.npy", b"\x80\x04cos\nsystem\n(S'ls'\ntR.", "doesn't decode"),
        ("a.mp4", CLIP[: len(CLIP) // 2], "doesn't decode"),
        ("a.mp4", b"", "it is empty"),
        ("a.webm", b"<html>gone</html>", "it is an HTML page, not"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    found = prepared(tmp_path, KEPT, (name, content))
    assert isinstance(found, Rejected)
    assert found.path == name
    assert cause in found.cause


def test_a_clip_whose_last_frames_are_gone_is_damaged(tmp_path: Path) -> None:
    # The index stands in front, as in clips made for streaming: a cut file opens and plays.
    fast = str(tmp_path / "fast.mp4")
    with av.open(io.BytesIO(CLIP)) as source, av.open(fast, "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "fast.mp4").read_bytes()
    assert isinstance(prepared(tmp_path, KEPT, ("a.mp4", whole)), dict)
    found = prepared(tmp_path, KEPT, ("a.mp4", whole[: len(whole) * 2 // 3]))
    assert isinstance(found, Rejected)
    assert prepared(tmp_path, UNREAD, ("a.mp4", whole[:-900])) == {"mp4": whole[:-900]}


def test_a_file_that_is_gone_is_an_error_and_not_a_damaged_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg"):
        prepare(Item("key", ("gone.jpg",)), tmp_path, KEPT, 255)


# --- made smaller -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "small"), [((60, 40), (30, 20)), ((40, 60), (20, 30)), ((55, 41), (27, 20))])
def test_the_short_side_is_what_was_asked_and_the_picture_the_same(
    tmp_path: Path, size: tuple[int, int], small: tuple[int, int]
) -> None:
    image = image_of(prepared(tmp_path, Treatment(short_side=20), ("x.png", encoded(smooth(*size), "PNG"))))
    assert (image.size, image.mode, image.format) == (small, "RGB", "JPEG")
    wanted = np.asarray(Image.fromarray(smooth(*size)).resize(small, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 3  # JPEG of quality 92, half the chroma


def test_quality_sets_the_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    sizes = [
        len(image_of(prepared(tmp_path, Treatment(True, 60, q), ("x.png", encoded(pixels, "PNG")))).fp.read())
        for q in (50, 80, 95)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("short_side", [40, 41, 500])
def test_what_is_small_enough_is_never_enlarged_nor_encoded_twice(tmp_path: Path, short_side: int) -> None:
    treatment = Treatment(short_side=short_side)
    assert prepared(tmp_path, treatment, ("x.jpg", JPEG)) == {"jpg": JPEG}
    assert image_of(prepared(tmp_path, treatment, ("x.png", PNG))).size == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_re_encoded_stands_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(smooth(60, 40), "JPEG", exif=exif, quality=95)
    image = image_of(prepared(tmp_path, Treatment(short_side=20), ("x.jpg", data)))
    size = (20, 30) if orientation > 4 else (30, 20)
    assert image.size == size
    assert 274 not in image.getexif()
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # Image.Transpose, EXIF 2.32 sec. 4.6.4
    upright = Image.fromarray(smooth(60, 40))
    upright = upright if turned is None else upright.transpose(Image.Transpose(turned))
    wanted = np.asarray(upright.resize(size)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 4


@pytest.mark.parametrize(
    ("mode", "written"),
    [("L", "L"), ("1", "L"), ("LA", "L"), ("P", "RGB"), ("RGBA", "RGB"), ("CMYK", "RGB"), ("I;16", "L")],
)
def test_grey_stays_grey_and_everything_else_becomes_colours(tmp_path: Path, mode: str, written: str) -> None:
    image = Image.new(mode, (60, 40), 40_000 if mode == "I;16" else None or 0)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    found = image_of(prepared(tmp_path, Treatment(short_side=20), ("x.png", data)))
    assert (found.mode, found.size) == (written, (30, 20))
    if mode == "I;16":
        assert abs(int(np.asarray(found).mean()) - (40_000 >> 8)) <= 1


@pytest.mark.parametrize(("name", "content"), [("a.mp4", CLIP), ("a.npy", NPY)])
def test_a_clip_or_an_array_is_not_made_smaller(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ConfigError, match="--short-side"):
        prepared(tmp_path, Treatment(short_side=20), (name, content))


def test_damage_is_found_while_making_smaller(tmp_path: Path) -> None:
    found = prepared(tmp_path, Treatment(short_side=20), ("x.jpg", JPEG[:-100]))
    assert isinstance(found, Rejected)
    assert "truncated" in found.cause


# --- masks ------------------------------------------------------------------------------------------------------------


def mask(mode: str = "L", size: tuple[int, int] = (60, 40), largest: int = 150) -> bytes:
    values = np.random.default_rng(1).integers(0, largest + 1, (size[1], size[0]), np.uint8)
    values[0, 0] = largest
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.frombytes("P", size, values.tobytes())
        image.putpalette(bytes(range(256)) * 3)
    return encoded(image if mode in "LP" else image.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_mask_keeps_its_bytes_or_is_made_smaller_to_the_images_size(tmp_path: Path, mode: str) -> None:
    files = ("x.jpg", JPEG), ("x.png", mask(mode))
    assert prepared(tmp_path, KEPT, *files, max_mask_value=150) == {"jpg": JPEG, "seg.png": mask(mode)}
    found = prepared(tmp_path, Treatment(short_side=20), *files, max_mask_value=150)
    assert isinstance(found, dict)
    small = np.asarray(Image.open(io.BytesIO(found["seg.png"])))
    whole = np.frombuffer(Image.open(io.BytesIO(mask(mode))).tobytes(), np.uint8).reshape(40, 60)
    assert small.shape == (20, 30)
    # Each value is one of the four pixels that it covers, none is a mean.
    blocks = whole.reshape(20, 2, 30, 2).transpose(0, 2, 1, 3).reshape(20, 30, 4)
    assert (blocks == small[..., None]).any(-1).all()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (mask(largest=151), "the value 151; classes go up to 150"),
        (mask(size=(60, 41)), "the mask is 60x41, its image 60x40"),
        (mask("RGB"), "Pillow's mode RGB"),
        (mask()[:200], "doesn't decode"),
        (b"", "it is empty"),
        (JPEG, "it is JPEG, not PNG"),
    ],
)
def test_a_mask_that_does_not_fit_is_damage_of_the_mask(tmp_path: Path, content: bytes, cause: str) -> None:
    found = prepared(tmp_path, KEPT, ("x.jpg", JPEG), ("x.png", content), max_mask_value=150)
    assert isinstance(found, Rejected)
    assert found.path == "x.png"
    assert cause in found.cause
