"""From bytes to pixels, and from an image to a crop."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swinv2_scale.data.decode import decode_image
from swinv2_scale.data.manifest import read_shard_set
from swinv2_scale.data.reader import Record, ShardReader
from swinv2_scale.data.transforms import central_resized_crop, crop_box, random_resized_crop, to_array
from swinv2_scale.data.writer import write_shards
from swinv2_scale.errors import DataError

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def smooth(mode: str = "RGB", width: int = 24, height: int = 16) -> Image.Image:
    """A gradient: lossy formats keep it within a few levels."""
    y, x = np.mgrid[:height, :width]
    planes = [8 * x, 12 * y, 255 - 5 * (x + y)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def decoded(extension: str, data: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode_image(Record("a", "000000.tar/a", {extension: data}), channels))


# --- what is decoded --------------------------------------------------------------------------------------------------


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert np.array_equal(decoded("png", encoded(Image.fromarray(pixels), "PNG")), pixels)
    assert np.array_equal(decoded("webp", encoded(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)
    assert np.array_equal(decoded("png", encoded(Image.fromarray(pixels[..., 0]), "PNG"), 1), pixels[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_grey_and_colour_come_with_as_many_channels_as_asked(extension: str, mode: str, channels: int) -> None:
    image = smooth(mode)
    found = decoded(extension, encoded(image, FORMATS[extension]), channels).astype(int)
    assert found.shape == ((16, 24) if channels == 1 else (16, 24, 3))
    wanted = np.asarray(image).astype(float)
    if mode == "RGB" and channels == 1:
        wanted = wanted @ [0.299, 0.587, 0.114]  # ITU-R 601-2 luma
    if mode == "L" and channels == 3:
        wanted = np.repeat(wanted[..., None], 3, -1)
    # JPEG and WEBP at their default quality lose a few levels of a smooth image, more at subsampled colours.
    assert abs(found - wanted).mean() < (1 if extension == "png" else 4)


def test_jpeg_is_known_by_both_of_its_names() -> None:
    data = encoded(smooth(), "JPEG")
    assert np.array_equal(decoded("jpeg", data), decoded("jpg", data))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_alpha_is_dropped_and_the_colours_below_it_stay(mode: str, channels: int) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, len(mode) - 1), dtype=np.uint8)
    alpha = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    image = Image.fromarray(np.concatenate((colour, alpha), -1))
    assert image.mode == mode
    assert np.array_equal(decoded("png", encoded(image, "PNG"), channels), colour.squeeze())


def test_palettes_become_the_colours_that_they_stand_for() -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 1), 1)
    found = decoded("png", encoded(image, "PNG"))
    assert found[1, 2].tolist() == [200, 100, 50]
    assert found[0, 0].tolist() == [10, 20, 30]


def test_a_16_bit_grey_image_keeps_its_brightness_or_is_refused() -> None:
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    data = encoded(Image.fromarray(pixels), "PNG")
    try:
        found = decoded("png", data, 1)
    except DataError:
        return
    # The upper eight bits, whichever way they are rounded; never a white image.
    assert abs(found.astype(int) - (pixels >> 8)).max() <= 1


def test_the_image_is_found_among_other_files() -> None:
    files = {"cls": b"7", "json": b"{}", "png": encoded(smooth(), "PNG"), "txt": b"a caption"}
    assert decode_image(Record("a", "a", files), 3).size == (24, 16)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "header only", "half", "html", "zeros"],
)
def test_what_is_no_whole_image_is_a_data_error_that_names_the_sample(extension: str, spoil: object) -> None:
    data = encoded(smooth(), FORMATS[extension])
    with pytest.raises(DataError, match=rf"000000\.tar/a: {extension} doesn't decode"):
        decoded(extension, spoil(data))  # type: ignore[operator]


@pytest.mark.parametrize("extension", FORMATS)
def test_damage_is_a_data_error_or_other_pixels_and_nothing_else(extension: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), FORMATS[extension])
    variants = [data[:length] for length in range(0, len(data), 3)]
    for place in range(0, len(data), 2):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 7
        variants.append(bytes(flipped))
    num_refused = 0
    for variant in variants:
        try:
            found = decoded(extension, variant)
        except DataError:
            num_refused += 1
        else:
            assert found.ndim == 3
            assert found.shape[2] == 3
    assert num_refused > len(data) // 4


@pytest.mark.parametrize(("extension", "content"), [(e, c) for e, c in itertools.product(FORMATS, FORMATS) if e != c])
def test_an_extension_may_hold_its_own_format_only(extension: str, content: str) -> None:
    with pytest.raises(DataError, match=rf"000000\.tar/a: {extension} doesn't decode"):
        decoded(extension, encoded(smooth(), FORMATS[content]))


@pytest.mark.parametrize("fmt", ["GIF", "BMP", "TIFF", "PPM", "EPS"])
def test_formats_outside_the_list_are_refused_under_any_name(fmt: str) -> None:
    data = encoded(smooth(), fmt)
    for extension in FORMATS:
        with pytest.raises(DataError, match="doesn't decode"):
            decoded(extension, data)
    with pytest.raises(DataError, match="has no image"):
        decoded(fmt.lower(), data)


def test_a_sample_without_an_image_says_what_it_holds() -> None:
    with pytest.raises(DataError, match=r"t\.tar/a has no image: it holds cls, txt"):
        decode_image(Record("a", "t.tar/a", {"cls": b"1", "txt": b""}), 3)
    with pytest.raises(DataError, match="it holds nothing"):
        decode_image(Record("a", "t.tar/a", {}), 3)


@pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**5)))
        + chunk(b"IEND", b"")
    )
    assert len(bomb) < 1000
    with pytest.raises(DataError, match="png doesn't decode"):
        decoded("png", bomb)


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.canary,)


def test_pickles_in_shards_stay_bytes(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bait = pickle.dumps(Bait(str(canary)))
    pickle.loads(bait)  # noqa: S301  the bait works
    canary.rmdir()
    names = ("pyd", "pickle", "pkl", "pth", "npy", "jpg")
    samples = [
        {"__key__": "a", **dict.fromkeys(names, bait)},
        {"__key__": "b", "png": encoded(smooth(), "PNG"), "pyd": bait},
    ]
    write_shards(samples, tmp_path / "s", samples_per_shard=2, made_by="a test")
    reader = ShardReader(read_shard_set(str(tmp_path / "s" / "*.tar")))
    first, second = reader.read(0, 0), reader.read(0, 1)
    reader.close()
    assert first.files == dict.fromkeys(names, bait)
    with pytest.raises(DataError, match="jpg doesn't decode"):
        decode_image(first, 3)
    decode_image(second, 3)
    assert not canary.exists()


# --- crops ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_a_random_box_is_never_empty_and_never_leaves_the_image(
    width: int, height: int, scale: list[float], ratio: list[float], seed: int
) -> None:
    box = crop_box(width, height, (scale[0], scale[1]), (ratio[0], ratio[1]), np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@settings(max_examples=200, deadline=None)
@given(width=st.integers(100, 2000), height=st.integers(100, 2000), seed=st.integers(0, 2**32))
def test_a_box_that_fits_has_the_share_and_the_shape_asked_for(width: int, height: int, seed: int) -> None:
    scale, ratio = (0.1, 0.3), (3 / 4, 4 / 3)
    left, top, right, bottom = crop_box(width, height, scale, ratio, np.random.default_rng(seed))
    w, h = right - left, bottom - top
    if width / height > 4 or height / width > 4:  # there it may not fit and the largest central box is taken
        assert ratio[0] * 0.9 < w / h < ratio[1] * 1.1
        return
    # Sides are rounded to whole pixels: by half a pixel each, of 27 or more.
    slack = (1 + 0.5 / (w - 1)) * (1 + 0.5 / (h - 1))
    assert scale[0] / slack <= w * h / (width * height) <= scale[1] * slack
    assert ratio[0] / slack <= w / h <= ratio[1] * slack


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (300, 30)])
def test_the_largest_central_box_is_taken_where_none_fits(width: int, height: int) -> None:
    box = crop_box(width, height, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    left, top, right, bottom = box
    assert min(right - left, bottom - top) == min(width, height)
    # The nearest ratio, rounded to a pixel.
    assert abs(max(right - left, bottom - top) - min(width, height) * 4 / 3) <= 0.5
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1


def test_boxes_are_uniform_in_area_and_reach_every_corner() -> None:
    rng = np.random.default_rng(1)
    boxes = np.array([crop_box(400, 400, (0.2, 0.6), (1.0, 1.0), rng) for _ in range(2000)])
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 400**2
    # 2000 draws: deciles of a uniform distribution within 0.4 * 5 * sqrt(.25 / 2000) = 0.022, and a pixel's rounding.
    assert np.allclose(np.quantile(share, [0, 0.25, 0.5, 0.75, 1]), [0.2, 0.3, 0.4, 0.5, 0.6], atol=0.03)
    assert boxes[:, :2].min(0).tolist() == [0, 0]
    assert boxes[:, 2:].max(0).tolist() == [400, 400]


def test_a_crop_depends_on_the_numbers_handed_in_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))

    def crop(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.asarray(random_resized_crop(image, (32, 24), (0.5, 1.0), (0.75, 1.33), "bilinear", rng))

    assert crop(1).shape == (32, 24, 3)
    np.random.seed(0)
    first = crop(1)
    np.random.seed(1)
    assert np.array_equal(first, crop(1))
    assert not np.array_equal(first, crop(2))


def test_a_crop_of_everything_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    for interpolation in ("bilinear", "bicubic"):
        crop = random_resized_crop(Image.fromarray(pixels), (32, 32), (1.0, 1.0), (1.0, 1.0), interpolation, rng)
        assert np.array_equal(np.asarray(crop), pixels)


@pytest.mark.parametrize(
    ("shape", "size", "rows", "columns"),
    [
        ((32, 52), (32, 32), slice(0, 32), slice(10, 42)),
        ((52, 32), (32, 32), slice(10, 42), slice(0, 32)),
        ((32, 48), (32, 48), slice(0, 32), slice(0, 48)),
        ((40, 24), (16, 24), slice(12, 28), slice(0, 24)),
    ],
)
def test_the_central_crop_is_the_largest_middle_box_of_the_targets_shape(
    shape: tuple[int, int], size: tuple[int, int], rows: slice, columns: slice
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    crop = central_resized_crop(Image.fromarray(pixels), size, "bilinear")
    assert np.array_equal(np.asarray(crop), pixels[rows, columns])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (28, 28), (333, 77)])
def test_the_central_crop_scales_any_image_to_the_size(shape: tuple[int, int]) -> None:
    crop = central_resized_crop(Image.new("L", shape, 77), (32, 48), "bicubic")
    assert crop.size == (48, 32)
    assert crop.getextrema() == (77, 77)


def test_arrays_have_channels_first_and_own_their_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    array = to_array(Image.fromarray(pixels))
    assert array.shape == (3, 5, 7)
    assert array.flags.c_contiguous
    assert all(np.array_equal(array[channel], pixels[..., channel]) for channel in range(3))
    assert to_array(Image.fromarray(pixels[..., 0])).shape == (1, 5, 7)
