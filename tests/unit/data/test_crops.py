"""From an image to a crop: which box, and that nothing but the numbers handed in decides it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swinv2_scale.data.images.decode import Picture
from swinv2_scale.data.images.resize import channels_first, mirrored
from swinv2_scale.data.images.transforms import central_resized_crop, crop_box, evaluation_crop, random_resized_crop
from tests.support.pictures import encoded, opened


def numbers(seed: int) -> Iterator[float]:
    return iter(np.random.default_rng(seed).random, None)


def picture(image: Image.Image) -> Picture:
    return opened("png", encoded(image, "PNG"), 3 if image.mode == "RGB" else 1)


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
    box = crop_box(width, height, (scale[0], scale[1]), (ratio[0], ratio[1]), numbers(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@settings(max_examples=200, deadline=None)
@given(width=st.integers(100, 2000), height=st.integers(100, 2000), seed=st.integers(0, 2**32))
def test_a_box_that_fits_has_the_share_and_the_shape_asked_for(width: int, height: int, seed: int) -> None:
    scale, ratio = (0.1, 0.3), (3 / 4, 4 / 3)
    left, top, right, bottom = crop_box(width, height, scale, ratio, numbers(seed))
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
    box = crop_box(width, height, (0.9, 1.0), (3 / 4, 4 / 3), numbers(0))
    left, top, right, bottom = box
    assert min(right - left, bottom - top) == min(width, height)
    # The nearest ratio, rounded to a pixel.
    assert abs(max(right - left, bottom - top) - min(width, height) * 4 / 3) <= 0.5
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1


def test_boxes_are_uniform_in_area_and_reach_every_corner() -> None:
    uniform = numbers(1)
    boxes = np.array([crop_box(400, 400, (0.2, 0.6), (1.0, 1.0), uniform) for _ in range(2000)])
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 400**2
    # 2000 draws: deciles of a uniform distribution within 0.4 * 5 * sqrt(.25 / 2000) = 0.022, and a pixel's rounding.
    assert np.allclose(np.quantile(share, [0, 0.25, 0.5, 0.75, 1]), [0.2, 0.3, 0.4, 0.5, 0.6], atol=0.03)
    assert boxes[:, :2].min(0).tolist() == [0, 0]
    assert boxes[:, 2:].max(0).tolist() == [400, 400]


def test_a_crop_depends_on_the_numbers_handed_in_alone() -> None:
    image = picture(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)))

    def crop(seed: int) -> np.ndarray:
        return random_resized_crop(image, (32, 24), (0.5, 1.0), (0.75, 1.33), "bilinear", numbers(seed))

    assert crop(1).shape == (3, 32, 24)
    np.random.seed(0)
    first = crop(1)
    np.random.seed(1)
    assert np.array_equal(first, crop(1))
    assert not np.array_equal(first, crop(2))


def test_a_crop_of_everything_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for interpolation in ("bilinear", "bicubic"):
        crop = random_resized_crop(
            picture(Image.fromarray(pixels)), (32, 32), (1.0, 1.0), (1.0, 1.0), interpolation, numbers(0)
        )
        assert np.array_equal(crop, channels_first(pixels))


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
    crop = central_resized_crop(picture(Image.fromarray(pixels)), size, "bilinear")
    assert np.array_equal(crop, channels_first(pixels[rows, columns]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (28, 28), (333, 77)])
def test_the_central_crop_scales_any_image_to_the_size(shape: tuple[int, int]) -> None:
    crop = central_resized_crop(picture(Image.new("L", shape, 77)), (32, 48), "bicubic")
    assert crop.shape == (1, 32, 48)
    assert (crop == 77).all()


def test_arrays_have_channels_first_and_own_their_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    array = channels_first(pixels)
    assert array.shape == (3, 5, 7)
    assert array.flags.c_contiguous
    assert all(np.array_equal(array[channel], pixels[..., channel]) for channel in range(3))
    assert channels_first(pixels[..., 0]).shape == (1, 5, 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_mirroring_exchanges_left_and_right(dtype: type) -> None:
    pixels = (1000 * np.random.default_rng(0).random((5, 7, 9))).astype(dtype)
    assert np.array_equal(mirrored(pixels), pixels[:, :, ::-1])


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (16, 16)])
@pytest.mark.parametrize(("width", "height"), [(40, 40), (61, 20), (20, 61)])
def test_an_evaluation_sees_the_middle_of_an_image_whatever_the_targets_shape(
    size: tuple[int, int], width: int, height: int
) -> None:
    ramp = np.mgrid[:height, :width].astype(np.uint8)
    rows, columns = (evaluation_crop(picture(Image.fromarray(part)), size, 0.8, "center", "bilinear") for part in ramp)
    assert rows.shape == (1, *size)
    # Half a pixel of the source for rounding the crop's place, half a level for rounding values.
    step = max(width / (size[1] / 0.8), height / (size[0] / 0.8), 1.0)
    assert abs(rows.mean() - (height - 1) / 2) <= step / 2 + 0.5
    assert abs(columns.mean() - (width - 1) / 2) <= step / 2 + 0.5
    # The tighter axis shows 0.8 of its side.
    seen = [float(np.ptp(part)) / length for part, length in ((rows, height), (columns, width))]
    assert max(seen) == pytest.approx(0.8, abs=0.12)


def test_a_strip_is_evaluated_within_memory() -> None:
    strip = np.zeros((1, 2_000_000), np.uint8)
    strip[:, 999_000:1_001_000] = 200
    found = evaluation_crop(opened("png", encoded(strip, "PNG"), 1), (192, 192), 0.875, "center", "bicubic")
    assert found.shape == (1, 192, 192)
    assert (found == 200).all()
