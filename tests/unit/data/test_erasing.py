"""Random erasing: where its boxes lie, what is in them, and that a sample's neighbours have no say in either."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from swinv2_scale.data.images.erasing import draw_boxes, erase
from swinv2_scale.draws import Draw

SIZES = [(64, 64), (48, 160), (192, 96)]
MODES = ["const", "rand", "pixel"]


def boxes_of(count: int, size: tuple[int, int], probability: float, most_boxes: int) -> NDArray[np.int32]:
    return np.stack([draw_boxes(Draw(1, 0, str(n)), size, probability, most_boxes) for n in range(count)])


def used(boxes: NDArray[np.int32]) -> NDArray[np.bool_]:
    return boxes.any(-1)


def world(samples: int = 9, most_boxes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, boxes and keys; the first sample has no box, others one to three."""
    size = (24, 40)
    boxes = torch.from_numpy(boxes_of(samples, size, 1.0, most_boxes))
    boxes[0] = 0
    images = torch.randn(samples, 3, *size, generator=torch.Generator().manual_seed(0))
    return images, boxes, torch.tensor([Draw(1, 0, str(n)).tensor_key("noise") for n in range(samples)])


# Boxes


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_inside_and_have_the_papers_areas_and_ratios(size: tuple[int, int]) -> None:
    drawn = boxes_of(1000, size, 1.0, 3)
    for boxes in drawn:
        here = boxes[used(boxes)]
        count = max(len(here), 1)
        for top, bottom, left, right in here:
            assert 0 <= top <= bottom <= size[0]
            assert 0 <= left <= right <= size[1]
            h, w = bottom - top, right - left
            # Each side is rounded by at most half a pixel. One of several that didn't fit leaves the others their size.
            rounding = (h + w) / 2 + 1 / 4
            assert size[0] * size[1] * 0.02 / 3 - rounding <= h * w <= size[0] * size[1] / 3 / count + rounding
            assert (h - 0.5) / (w + 0.5) <= 1 / 0.3
            assert (h + 0.5) / max(w - 0.5, 1e-9) >= 0.3


def test_the_shares_of_one_box_are_spread_evenly_over_their_range_and_the_places_over_the_image() -> None:
    size = 1000, 1000  # the largest box, 577 / sqrt(0.3) long, may not fit: then another is drawn
    boxes = boxes_of(3000, size, 1.0, 1)[:, 0].astype(float)
    h, w = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    # Below a share of 0.3 every ratio fits. The draws are fixed: nothing flickers, and honest ones are beyond this
    # once in a thousand.
    share = h * w / 1e6
    small = share < 0.3
    assert stats.kstest(share[small], stats.uniform(0.02, 0.28).cdf).pvalue > 1e-3
    log_ratio = np.log(h / w)[small]
    assert stats.kstest(log_ratio, stats.uniform(math.log(0.3), -2 * math.log(0.3)).cdf).pvalue > 1e-3
    for start, room in ((boxes[:, 0], 1001 - h), (boxes[:, 2], 1001 - w)):
        # Places are whole pixels: half of one is put on top.
        assert stats.kstest((start + 0.5) / room, stats.uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_so_many_samples_have_boxes_as_the_probability_says(probability: float) -> None:
    has_box = used(boxes_of(2000, (64, 64), probability, 2)).any(-1)
    # 5 standard deviations; at 0 and 1 there are none.
    assert abs(has_box.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 2000)


def test_every_number_of_boxes_up_to_the_most_is_as_likely() -> None:
    numbers = used(boxes_of(3000, (64, 64), 1.0, 4)).sum(-1)
    assert stats.chisquare([(numbers == count).sum() for count in (1, 2, 3, 4)]).pvalue > 1e-3


def test_boxes_follow_from_seed_epoch_and_sample_alone() -> None:
    def drawn(draw: Draw) -> bytes:
        return draw_boxes(draw, (64, 64), 1.0, 2).tobytes()

    first = drawn(Draw(1, 2, "a", 3))
    assert drawn(Draw(1, 2, "a", 4)) == first
    assert first not in (drawn(Draw(2, 2, "a")), drawn(Draw(1, 3, "a")), drawn(Draw(1, 2, "b")))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 2)])
def test_no_box_is_all_of_a_tiny_image(size: tuple[int, int]) -> None:
    for top, bottom, left, right in boxes_of(50, size, 1.0, 1)[:, 0]:
        assert 0 <= top <= bottom <= size[0]
        assert 0 <= left <= right <= size[1]
        assert (bottom - top) * (right - left) < size[0] * size[1]


# What is in them


@pytest.mark.parametrize("mode", MODES)
def test_what_lies_outside_the_boxes_stays_and_all_inside_changes(mode: str) -> None:
    images, boxes, keys = world()
    before = images.clone()
    erased = erase(images, boxes, keys, mode)
    assert torch.equal(images, before)
    for image, result, own in zip(images, erased, boxes, strict=True):
        is_inside = torch.zeros(image.shape[1:], dtype=torch.bool)
        for top, bottom, left, right in own.tolist():
            is_inside[top:bottom, left:right] = True
        assert torch.equal(result != image, is_inside.expand_as(image))
    assert torch.equal(erased[0], images[0])


def test_const_is_zero() -> None:
    images, boxes, keys = world()
    erased = erase(images, boxes, keys, "const")
    assert set(erased[erased != images].tolist()) == {0.0}


def test_rand_is_a_colour_of_each_box_and_the_later_one_lies_on_top() -> None:
    images = torch.zeros(2, 3, 8, 8)
    boxes = torch.tensor([[(0, 6, 0, 6), (4, 8, 4, 8)]] * 2)
    erased = erase(images, boxes, torch.tensor([5, 6]), "rand")
    for result in erased:
        first, second = result[:, 0, 0], result[:, 7, 7]
        assert torch.equal(result[:, 4:8, 4:8], second[:, None, None].expand(3, 4, 4))
        assert torch.equal(result[:, :4, :6], first[:, None, None].expand(3, 4, 6))
        assert len({*first.tolist(), *second.tolist()}) == 6
    assert not set(erased[0].flatten().tolist()) & set(erased[1].flatten().tolist()) - {0.0}


@pytest.mark.parametrize(("mode", "numbers"), [("rand", 3 * 2), ("pixel", 3 * 16 * 16)])
def test_noise_is_standard_normal(mode: str, numbers: int) -> None:
    samples = 12_000 // numbers
    halves = torch.tensor([[(0, 8, 0, 16), (8, 16, 0, 16)]] * samples)
    erased = erase(torch.full((samples, 3, 16, 16), 9.0), halves, torch.arange(samples), mode)
    found = np.unique(erased.numpy())
    # Float32 of 24 bits: a few numbers may be there twice.
    assert len(found) > 0.99 * samples * numbers
    assert stats.kstest(found, stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_samples_noise_is_its_keys_whatever_the_batch(mode: str) -> None:
    images, boxes, keys = world()
    together = erase(images, boxes, keys, mode)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(3))
    assert torch.equal(erase(images[order], boxes[order], keys[order], mode), together[order])
    for number in range(len(keys)):
        own = slice(number, number + 1)
        assert torch.equal(erase(images[own], boxes[own], keys[own], mode), together[own])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_keep_their_type(mode: str, dtype: torch.dtype) -> None:
    images, boxes, keys = world()
    erased = erase(images.to(dtype), boxes, keys, mode)
    assert erased.dtype == dtype
    assert torch.equal(erased, erase(images, boxes, keys, mode).to(dtype))
