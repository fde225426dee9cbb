"""The fast decoder beside the exact one: the same verdicts, the same geometry, nearly the same pixels."""

from __future__ import annotations

import io
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from swinv2_scale.data.images.fast_jpeg import everyday_header
from swinv2_scale.errors import SampleError
from tests.support.pictures import decoded, encoded, opened, smooth

SIZE = (96, 96)


@cache
def photograph(name: str, width: int, height: int) -> Image.Image:
    with Image.open(Path(str(resources.files("skimage.data"))) / name) as image:
        return ImageOps.fit(image.convert("RGB"), (width, height))


def both(data: bytes, box: tuple[float, ...], size: tuple[int, int], channels: int = 3) -> list[np.ndarray]:
    return [
        opened("jpg", data, channels, decoder=decoder).resized(box, size, "bicubic").astype(float)  # type: ignore[arg-type]
        for decoder in ("fast", "exact")
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "most"),
    # Mean absolute differences found are up to 1.6, 1.9 and 2.6 of 255 levels; Pillow's own bilinear is 1.4, 1.4 and
    # 2.3 from its bicubic, and a box that is off by half an output pixel 4.9, 5.4 and 8.1.
    [("coffee.png", 2.0), ("chelsea.png", 2.2), ("astronaut.png", 3.0)],
)
@pytest.mark.parametrize("shrink", [0.7, 1.0, 1.3, 1.9, 2.6, 3.5, 7.0])
def test_photographs_differ_by_little(name: str, most: float, shrink: float, channels: int) -> None:
    side = round(96 * shrink)
    data = encoded(photograph(name, side + 40, side + 30), "JPEG", quality=92)
    fast, exact = both(data, (13, 7, 13 + side, 7 + side), SIZE, channels)
    assert abs(fast - exact).mean() < most
    # No shade is added: two decoders and two filters agree on the mean to half a level.
    assert abs(fast.mean() - exact.mean()) < 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_at_its_own_size_a_colour_jpeg_has_the_very_same_pixels(channels: int) -> None:
    data = encoded(photograph("chelsea.png", 80, 60), "JPEG", quality=92)
    fast, exact = both(data, (9, 5, 69, 45), (40, 60), channels)
    # The grey of a colour JPEG is its luma plane, which Pillow computes back from rounded colours.
    assert abs(fast - exact).max() <= (2 if channels == 1 else 0)


@pytest.mark.parametrize("shrink", [0.8, 1.0, 1.4, 1.9, 2.2, 3.1, 4.7, 6.5, 9.3, 17.0])
@pytest.mark.parametrize("offset", [0, 3, 5.5])
def test_a_box_lies_where_the_exact_decoder_has_it(shrink: float, offset: float) -> None:
    side = round(48 * shrink)
    width, height = side + 21, side + 13
    y, x = np.mgrid[:height, :width]
    slope = 200 / max(width, height)
    ramp = np.stack([20 + slope * x, 20 + slope * y, 0 * x + 128], -1).round().astype(np.uint8)
    data = encoded(Image.fromarray(ramp), "JPEG", quality=100, subsampling=0)
    fast, exact = both(data, (offset, offset + 2, offset + side, offset + 2 + side), (48, 48))
    # Output pixels are `slope * shrink` levels apart; the mean of each row or column away from the border (where a
    # filter may look outside the box or not) says where the box lies: within a tenth of an output pixel.
    for channel, axis in ((0, 0), (1, 1)):
        shift = (fast - exact)[channel].mean(axis)[3:-3] / (slope * shrink)
        # Rounding of a level's half in both, averaged over 48 pixels that may round alike.
        assert abs(shift.mean()) < 0.1
    left, right = ((fast - exact)[0].mean(0)[part] / (slope * shrink) for part in (slice(3, 12), slice(-12, -3)))
    assert abs(left.mean() - right.mean()) < 0.2  # nor is it wider


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_as_pillow_turns_it(orientation: int, decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(width=40, height=24), "JPEG", quality=100, subsampling=0, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = opened("jpg", data, decoder=decoder)
    assert (picture.width, picture.height) == wanted.size
    box, size = (2, 5, 22, 21), (16, 20)
    found = picture.resized(box, size, "bilinear").transpose(1, 2, 0)
    assert np.array_equal(found, np.asarray(wanted.crop(box)))


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("extension", ["png", "webp"])
def test_other_formats_are_turned_too(extension: str, decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if extension == "webp" else {}
    data = encoded(smooth(), {"png": "PNG", "webp": "WEBP"}[extension], exif=exif, **options)
    assert np.array_equal(decoded(extension, data, decoder=decoder), np.rot90(np.asarray(smooth()), -1))


def test_an_unreadable_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0garbage")
    assert decoded("jpg", data, decoder="fast").shape == decoded("jpg", data).shape == (16, 24, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"quality": 1},
        {"optimize": True},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_everyday_jpegs_are_recognised(options: dict[str, object], mode: str) -> None:
    header = everyday_header(encoded(smooth(mode), "JPEG", **options))
    assert header is not None
    assert (header.width, header.height, header.has_note) == (24, 16, False)
    for channels in (1, 3):
        data = encoded(smooth(mode), "JPEG", **options)
        fast = decoded("jpg", data, channels, decoder="fast").astype(int)
        # Grey of colours beyond the range (quality 1) is clipped once or twice: 22 levels.
        assert abs(fast - decoded("jpg", data, channels)).max() <= (0 if channels == 3 or mode == "L" else 25)


def verdict(data: bytes, decoder: str) -> tuple[int, int] | None:
    """Its size where it is accepted."""
    try:
        picture = opened("jpg", data, decoder=decoder, max_pixels=10_000)  # damaged sizes can be large
        picture.resized((0, 0, picture.width, picture.height), (8, 8), "bilinear")
    except SampleError:
        return None
    return picture.width, picture.height


TURNED = Image.Exif()
TURNED[0x0112] = 6
SOURCES = [
    encoded(smooth(width=40, height=32), "JPEG", quality=90),
    encoded(smooth("L", width=40, height=32), "JPEG", progressive=True),
    encoded(smooth(width=40, height=32).convert("CMYK"), "JPEG"),
    encoded(smooth(width=40, height=32), "JPEG", exif=TURNED),
]


@settings(max_examples=400, deadline=None)
@given(
    source=st.sampled_from(SOURCES),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damage_has_the_same_verdict_from_both_decoders(
    source: bytes, flips: list[tuple[float, int]], kept: float
) -> None:
    damaged = bytearray(source)
    for place, change in flips:
        damaged[int(place * len(damaged))] ^= change
    data = bytes(damaged[: int(kept * len(damaged))])
    assert verdict(data, "fast") == verdict(data, "exact")


def test_every_flipped_byte_of_a_header_has_the_same_verdict() -> None:
    for source in SOURCES:
        end = source.index(b"\xff\xda") + 16
        for place in range(end):
            for change in (0x01, 0x80, 0xFF):
                data = bytearray(source)
                data[place] ^= change
                assert verdict(bytes(data), "fast") == verdict(bytes(data), "exact"), (place, change)


def test_an_axis_that_shrinks_by_more_than_two_is_not_aliased() -> None:
    """Stripes as narrow as pixels, which nothing may turn into broad ones."""
    stripes = np.tile(np.where(np.arange(300) % 5 < 2, 220, 40).astype(np.uint8), (110, 1))
    fast, exact = both(encoded(Image.fromarray(stripes), "JPEG", quality=95), (5, 5, 285, 105), SIZE, channels=1)
    # Standard deviations: Pillow's filter leaves 25 levels, ours 51, two neighbours without a blur 75.
    assert exact.std() < 30
    assert fast.std() < 60
