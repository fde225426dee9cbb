"""RandAugment: which operations are drawn, and that nothing but the sample's draw decides them.

That each operation is timm's is shown in tests/parity/test_augment.py.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from swinv2_scale.data.images.augment import OPERATIONS, Step, Warp, draw_steps, rand_augment
from swinv2_scale.draws import Draw

FILL = {1: (90,), 3: (124, 116, 104)}
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
TWO_SIDED = {name for name in OPERATIONS if name.startswith(("Rotate", "Shear", "Translate"))} | {
    f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")
}


def noise(channels: int = 3, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8)


def augmented(sample: str, channels: int = 3, **fields: object) -> np.ndarray:
    return rand_augment(noise(channels), Draw(0, 0, sample), FILL[channels], **fields)


def many_steps(count: int = 20_000, **fields: object) -> list[Step]:
    usual = {"magnitude": 9.0, "magnitude_std": 0.5, "interpolation": "random", **fields}
    return draw_steps(np.random.default_rng(4), count, **usual)


# What is drawn


def test_half_of_the_operations_are_applied_and_each_as_often_as_the_others() -> None:
    steps = many_steps()
    # Five standard deviations of 20,000 coins.
    assert abs(len(steps) - 10_000) < 5 * math.sqrt(20_000 / 4)
    counts = Counter(step.operation for step in steps)
    assert set(counts) == set(OPERATIONS)
    # The draws are fixed, so nothing flickers; an honest sample is below this once in a thousand.
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_levels_are_normal_around_the_magnitude_and_cut_at_ten() -> None:
    strengths = np.abs([step.strength for step in many_steps()])
    cut = strengths == 1
    expected = stats.norm(0.9, 0.05)
    share = expected.sf(1)
    assert abs(cut.mean() - share) < 5 * math.sqrt(share / len(cut))
    assert stats.kstest(strengths[~cut], lambda s: expected.cdf(s) / (1 - share)).pvalue > 1e-3


@pytest.mark.parametrize(("magnitude", "expected"), [(-3.0, 0.0), (0.0, 0.0), (4.0, 0.4), (10.0, 1.0), (30.0, 1.0)])
def test_a_deviation_of_zero_gives_the_magnitude_itself_within_its_range(magnitude: float, expected: float) -> None:
    assert {abs(step.strength) for step in many_steps(500, magnitude=magnitude, magnitude_std=0.0)} == {expected}


def test_operations_with_two_sides_go_either_way_and_the_others_one() -> None:
    steps = many_steps()
    assert all(step.strength > 0 for step in steps if step.operation not in TWO_SIDED)
    negative = [step.strength < 0 for step in steps if step.operation in TWO_SIDED]
    assert abs(sum(negative) - len(negative) / 2) < 5 * math.sqrt(len(negative) / 4)


def test_the_filter_is_drawn_only_where_it_is_random_and_whatever_the_side() -> None:
    steps = [step for step in many_steps() if step.operation in TWO_SIDED]
    for side in (-1, 1):
        filters = Counter(step.resample for step in steps if step.strength * side > 0)
        assert set(filters) == {BILINEAR, BICUBIC}
        assert abs(filters[BILINEAR] - filters[BICUBIC]) < 5 * math.sqrt(sum(filters.values()))
    assert {step.resample for step in many_steps(500, interpolation="bicubic")} == {BICUBIC}
    assert {step.resample for step in many_steps(500, interpolation="bilinear")} == {BILINEAR}


def test_another_magnitude_changes_the_strengths_alone() -> None:
    for one, other in zip(many_steps(500), many_steps(500, magnitude=5.0), strict=True):
        assert (one.operation, one.resample) == (other.operation, other.resample)
        assert abs(one.strength) > abs(other.strength)


def test_the_smallest_uniform_number_has_a_level_too() -> None:
    class Zeros(np.random.Generator):
        def random(self, size: tuple[int, int]) -> np.ndarray:  # type: ignore[override]
            return np.zeros(size)

    steps = draw_steps(Zeros(np.random.Philox(0)), 1, 9.0, 0.5, "random")
    # Eight standard deviations of 0.5 below 9.
    assert [(step.operation, step.strength) for step in steps] == [("AutoContrast", pytest.approx(0.49, abs=0.02))]


# What comes out


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_keeps_its_shape_and_type_and_the_one_handed_in_is_not_changed(channels: int) -> None:
    for sample in range(60):
        pixels = noise(channels)
        found = rand_augment(pixels, Draw(0, 0, str(sample)), FILL[channels], num_ops=4)
        assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
        assert found.flags.c_contiguous
        assert np.array_equal(pixels, noise(channels))


def test_an_image_depends_on_its_draw_alone() -> None:
    first = [augmented(str(sample)) for sample in range(30)]
    random.seed(9)
    np.random.seed(9)
    again = [augmented(str(sample)) for sample in reversed(range(30))][::-1]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    # A quarter is left alone: both coins say so.
    assert len({found.tobytes() for found in first}) > 15
    others = [rand_augment(noise(), Draw(0, 1, str(sample)), FILL[3]) for sample in range(30)]
    assert sum(np.array_equal(one, other) for one, other in zip(first, others, strict=True)) < 10


def test_a_view_of_a_larger_array_is_as_good_as_a_copy() -> None:
    large = noise(3, 60, 70)
    view = large[:, 10:34, 20:52]
    for sample in range(20):
        draw = Draw(0, 0, str(sample))
        assert np.array_equal(rand_augment(view, draw, FILL[3]), rand_augment(view.copy(), draw, FILL[3]))


def test_no_operations_leave_the_image_as_it_is() -> None:
    assert np.array_equal(augmented("a", num_ops=0), noise())


# Operations against their formulas


def applied(name: str, pixels: np.ndarray, strength: float, fill: tuple[int, ...] = (90,)) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), strength, Warp(BILINEAR, fill)))


ALL_VALUES = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 4), (0.24, 4), (0.25, 3), (0.9, 1), (1.0, 0)])
def test_posterize_keeps_the_highest_bits_down_to_none(strength: float, bits: int) -> None:
    step = 2 ** (8 - bits)
    assert np.array_equal(applied("PosterizeIncreasing", ALL_VALUES, strength), ALL_VALUES.astype(int) // step * step)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_solarize_inverts_what_is_bright(strength: float) -> None:
    threshold = 256 - int(256 * strength)
    expected = np.where(threshold > ALL_VALUES, ALL_VALUES, 255 - ALL_VALUES)
    assert np.array_equal(applied("SolarizeIncreasing", ALL_VALUES, strength), expected)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_adding_brightens_the_dark_half(strength: float) -> None:
    values = ALL_VALUES.astype(int)
    expected = np.where(values < 128, np.minimum(values + int(110 * strength), 255), values)
    assert np.array_equal(applied("SolarizeAdd", ALL_VALUES, strength), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.5, -0.5])
def test_a_translation_moves_the_content_and_fills_with_the_mean(channels: int, strength: float) -> None:
    pixels = noise(channels, 40, 40).transpose(1, 2, 0)
    image = pixels if channels == 3 else pixels[..., 0]
    found = applied("TranslateXRel", image, strength, FILL[channels]).reshape(pixels.shape)
    moved = 9  # 0.5 * 0.45 * 40
    kept, empty = (slice(0, 31), slice(31, 40)) if strength > 0 else (slice(9, 40), slice(0, 9))
    expected = np.roll(pixels, -moved if strength > 0 else moved, axis=1)
    assert np.array_equal(found[:, kept], expected[:, kept])
    assert (found[:, empty] == FILL[channels]).all()


@pytest.mark.parametrize("name", sorted(TWO_SIDED))
def test_a_strength_of_zero_changes_nothing_where_there_are_two_sides(name: str) -> None:
    pixels = noise().transpose(1, 2, 0)
    assert np.array_equal(applied(name, pixels, 0.0, FILL[3]), pixels)
