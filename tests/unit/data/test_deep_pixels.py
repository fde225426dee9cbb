"""Sixteen bits, floats and other numbers of channels: every bit that the model asks for, and clear words otherwise."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from swinv2_scale.errors import SampleError
from tests.support.pictures import decoded, encoded, npy, opened, smooth

RNG = np.random.default_rng(0)
GREY_16 = RNG.integers(0, 65536, (9, 12), dtype=np.uint16)
COLOUR_16 = RNG.integers(0, 65536, (9, 12, 3), dtype=np.uint16)
FLOATS = RNG.normal(0, 5, (9, 12, 3)).astype(np.float32)
FIVE = RNG.integers(0, 65536, (9, 12, 5), dtype=np.uint16)


def png_16(pixels: np.ndarray) -> bytes:
    """OpenCV writes what Pillow can't; its colours are blue, green, red, alpha."""
    order = {2: pixels, 3: pixels[..., ::-1] if pixels.shape[-1] == 3 else pixels[..., [2, 1, 0, 3]]}[pixels.ndim]
    return bytes(cv2.imencode(".png", order)[1])


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb" if pixels.shape[-1] == 3 else "minisblack", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("extension", "data", "pixels"),
    [
        ("png", png_16(GREY_16), GREY_16),
        ("png", encoded(Image.fromarray(GREY_16), "PNG"), GREY_16),
        ("png", png_16(COLOUR_16), COLOUR_16),
        ("png", png_16(np.concatenate((COLOUR_16, GREY_16[..., None]), -1)), COLOUR_16),
        ("tif", tiff(GREY_16), GREY_16),
        ("tiff", tiff(COLOUR_16), COLOUR_16),
        ("tif", tiff(COLOUR_16, compression="zlib"), COLOUR_16),
        ("tif", tiff(COLOUR_16, byteorder=">"), COLOUR_16),
        ("npy", npy(GREY_16), GREY_16),
        ("npy", npy(COLOUR_16), COLOUR_16),
        ("npy", npy(COLOUR_16.astype(">u2")), COLOUR_16),
        ("npy", npy(np.asfortranarray(COLOUR_16)), COLOUR_16),
    ],
)
def test_sixteen_bits_are_kept_as_uint16_and_scaled_for_the_others(
    extension: str, data: bytes, pixels: np.ndarray
) -> None:
    channels = 1 if pixels.ndim == 2 else 3
    kept = decoded(extension, data, channels, pixel_type="uint16")
    assert kept.dtype == np.uint16
    assert np.array_equal(kept, pixels)
    for decoder in ("exact", "fast"):
        assert np.array_equal(decoded(extension, data, channels, decoder=decoder), pixels >> 8)
    fraction = decoded(extension, data, channels, pixel_type="float32")
    assert fraction.dtype == np.float32
    # One float32 division.
    assert np.allclose(fraction, pixels / 65535, rtol=2e-7, atol=0)


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "tif"])
def test_eight_bits_fill_the_range_of_wider_types(extension: str) -> None:
    names = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF"}
    data = encoded(smooth(), names[extension])
    eight = decoded(extension, data)
    assert np.array_equal(decoded(extension, data, pixel_type="uint16"), eight.astype(np.uint16) * 257)
    assert np.allclose(decoded(extension, data, pixel_type="float32"), eight / 255, rtol=2e-7, atol=0)


def test_floats_keep_their_values_whatever_they_are() -> None:
    for pixels in (FLOATS, FLOATS.astype(np.float64), FLOATS.astype(np.float16)):
        found = decoded("npy", npy(pixels), pixel_type="float32")
        assert found.dtype == np.float32
        assert np.array_equal(found, pixels.astype(np.float32))
    assert np.array_equal(decoded("tif", tiff(FLOATS), pixel_type="float32"), FLOATS)
    assert np.array_equal(decoded("tif", tiff(FLOATS[..., 0]), 1, pixel_type="float32"), FLOATS[..., 0])


@pytest.mark.parametrize("pixel_type", ["uint8", "uint16"])
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_floats_have_no_range_that_integers_could_take(pixel_type: str, decoder: str) -> None:
    with pytest.raises(SampleError, match=f"float32, data.pixel_type is {pixel_type}: set it to float32"):
        decoded("npy", npy(FLOATS), pixel_type=pixel_type, decoder=decoder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("extension", ["npy", "tif"])
def test_a_value_that_is_not_finite_is_refused(value: float, extension: str) -> None:
    pixels = FLOATS.astype(np.float64)
    pixels[3, 4, 1] = value
    data = npy(pixels) if extension == "npy" else tiff(pixels)
    with pytest.raises(SampleError, match="not finite"):
        decoded(extension, data, pixel_type="float32")


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("npy", npy(FIVE)),
        ("tif", tiff(FIVE, planarconfig="contig")),
        ("tif", tiff(FIVE.transpose(2, 0, 1), planarconfig="separate")),
        ("tif", tiff(FIVE.transpose(2, 0, 1))),  # five pages
    ],
    ids=["npy", "samples", "planes", "pages"],
)
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_any_number_of_channels_comes_through(extension: str, data: bytes, decoder: str) -> None:
    assert np.array_equal(decoded(extension, data, 5, pixel_type="uint16", decoder=decoder), FIVE)
    assert np.array_equal(decoded(extension, data, 5, decoder=decoder), FIVE >> 8)


@pytest.mark.parametrize(("found", "wanted"), [(5, 3), (5, 1), (2, 5), (3, 4), (1, 2)])
def test_channels_that_are_not_the_models_are_refused_with_both_numbers(found: int, wanted: int) -> None:
    with pytest.raises(SampleError, match=f"it has {found} channels, the model reads {wanted}"):
        decoded("npy", npy(RNG.integers(0, 256, (4, 6, found), dtype=np.uint8)), wanted)


def test_grey_and_colour_arrays_become_each_other() -> None:
    assert np.array_equal(
        decoded("npy", npy(GREY_16), 3, pixel_type="uint16"), np.repeat(GREY_16[..., None], 3, axis=2)
    )
    grey = decoded("npy", npy(COLOUR_16), 1, pixel_type="uint16")
    # Half a level of rounding, and float32's 2^-24 of 65535 in three products.
    assert abs(grey - COLOUR_16 @ [0.299, 0.587, 0.114]).max() < 0.52


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (npy(FLOATS)[:-1], "bytes after its header"),
        (npy(FLOATS) + b"x", "bytes after its header"),
        (npy(FLOATS)[:20], "doesn't decode"),
        (npy(np.zeros(7, np.uint8)), r"its shape is \(7,\)"),
        (npy(np.zeros((2, 2, 2, 2), np.uint8)), r"its shape is \(2, 2, 2, 2\)"),
        (npy(np.zeros((0, 5), np.uint8)), "5x0 pixels"),
        (npy(np.zeros((5, 5), np.int64)), "its values are int64"),
        (npy(np.zeros((5, 5), np.complex64)), "its values are complex64"),
        (npy(np.zeros((5, 5), "U3")), "its values are <U3"),
    ],
)
def test_an_array_that_is_no_image_is_refused_in_words(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError, match=cause):
        decoded("npy", data)


def test_a_header_cannot_ask_for_more_channels_than_there_are_bytes() -> None:
    data = npy(np.zeros((5, 5, 1), np.uint8))
    data = data.replace(b"(5, 5, 1)", b"(5, 5, 9999999999)".ljust(9))
    with pytest.raises(SampleError, match="doesn't decode"):
        opened("npy", data)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (tiff(np.zeros((9, 12, 90), np.uint8), planarconfig="contig", compression="zlib"), "says 90 channels of 12x9"),
        (tiff(FIVE, planarconfig="contig", tile=(256, 256), compression="zlib"), "256x256 = 65,536 pixels"),
        (tiff(np.zeros((16, 9, 12), np.uint8), volumetric=True), "it is a volume"),
    ],
    ids=["channels", "tile", "volume"],
)
def test_a_tiff_is_refused_before_it_takes_more_memory_than_images_do(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError, match=cause):
        opened("tif", data, 5, max_pixels=200)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(1.5, 0.0, 10.25, 8.0), (0, 0, 12, 9)])
def test_wide_types_are_resized_as_eight_bits_are(interpolation: str, box: tuple[float, float, float, float]) -> None:
    image = smooth(width=12, height=9)
    data = encoded(image, "PNG")
    eight = opened("png", data).resized(box, (5, 7), interpolation).astype(float)
    wide = opened("png", data, pixel_type="uint16").resized(box, (5, 7), interpolation) / 257
    fraction = opened("png", data, pixel_type="float32").resized(box, (5, 7), interpolation) * 255
    # Pillow rounds 8 bits after each of its two passes: a level at most.
    assert abs(wide - eight).max() <= 1
    assert abs(fraction - wide).max() <= 0.01


def test_overshoot_is_clipped_to_the_type() -> None:
    pixels = np.zeros((8, 8), np.uint16)
    pixels[:, 4:] = 65535
    found = opened("npy", npy(pixels), 1, pixel_type="uint16").resized((0, 0, 8, 8), (8, 24), "bicubic")
    # Bicubic overshoots at an edge; a number beyond the type would come back from its other end.
    assert (found[..., :10] < 20_000).all()
    assert (found[..., 14:] > 45_000).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_upright_in_every_type(orientation: int) -> None:
    extratags = [(274, "H", 1, orientation, True)]
    wanted = np.asarray(_turned(COLOUR_16[..., 0] >> 8, orientation))
    data = tiff(COLOUR_16, extratags=extratags)
    assert np.array_equal(decoded("tif", data, pixel_type="uint16")[..., 0] >> 8, wanted)
    assert np.array_equal(decoded("tif", data)[..., 0], wanted)


def _turned(pixels: np.ndarray, orientation: int) -> Image.Image:
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.fromarray(pixels.astype(np.uint8))
    return image.transpose(methods[orientation]) if orientation in methods else image
