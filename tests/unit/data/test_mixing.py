"""mixup and cutmix: whose numbers, how distributed, and that no cutting of a global batch shows in them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from swinv2_scale.data.images.mixing import cut_box, draw_mixing, mix, soft_targets, symmetric_beta
from swinv2_scale.data.order import positions_of

SIZE = (12, 20)
#: timm's values, as the Swin recipes have them.
USUAL: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_probability": 0.5}


def numbers(seed: int, positions: range, size: tuple[int, int] = SIZE, **changes: float) -> Tensor:
    return torch.from_numpy(np.stack([draw_mixing(seed, p, size, **{**USUAL, **changes}) for p in positions]))


def batch(count: int, num_classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, *SIZE, generator=generator)
    return images, soft_targets(torch.randint(num_classes, (count,), generator=generator), num_classes, 0.1)


# The numbers


def check_beta(shares: np.ndarray, alpha: float) -> None:
    """Within 0.001 .. 0.999 by Kolmogorov and Smirnov, beyond by counts: small alphas come nearer to 1 than floats."""
    beta, edge, count = stats.beta(alpha, alpha), 1e-3, len(shares)
    tail = beta.cdf(edge)
    for beyond in (shares < edge, shares > 1 - edge):
        assert abs(beyond.sum() - count * tail) <= 5 * math.sqrt(count * tail * (1 - tail))
    inside = shares[(edge <= shares) & (shares <= 1 - edge)]
    # The numbers are fixed, so nothing flickers; an honest sample is below this once in a thousand.
    assert stats.kstest(inside, lambda x: (beta.cdf(x) - tail) / (1 - 2 * tail)).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    uniform = np.random.default_rng(1).random((20_000, 2))
    check_beta(np.array([symmetric_beta(alpha, first, second) for first, second in uniform]), alpha)


@settings(max_examples=200, deadline=None)
@given(
    alpha=st.floats(1e-4, 1e4),
    first=st.floats(0, 1, exclude_max=True),
    second=st.floats(0, 1, exclude_max=True),
)
def test_a_share_of_any_alpha_lies_between_0_and_1(alpha: float, first: float, second: float) -> None:
    assert 0 <= symmetric_beta(alpha, first, second) <= 1


def test_mixups_weights_follow_its_alpha() -> None:
    found = numbers(3, range(0, 8000, 2), mixup_alpha=0.3, cutmix_alpha=0.0)
    assert torch.equal(found[:, 0], found[:, 1])
    assert (found[:, 2:] == torch.tensor([0, SIZE[0], 0, SIZE[1]])).all()
    check_beta(found[:, 1].double().numpy(), 0.3)
    # And where cutmix takes its part of the pairs: which it takes says nothing about the weights.
    found = numbers(3, range(0, 8000, 2))
    check_beta(found[found[:, 0] > 0, 1].double().numpy(), 0.8)


def test_cutmixs_boxes_follow_its_alpha() -> None:
    top, bottom, left, right = numbers(3, range(0, 8000, 2), (4000, 4000), mixup_alpha=0.0)[:, 2:].double().T
    is_whole = (top > 0) & (bottom < 4000) & (left > 0) & (right < 4000)
    sides = ((bottom - top) / 4000)[is_whole].numpy()
    assert len(sides) > 500
    # Areas of Beta(1, 1) give sides s of density 2 s; the share (1 - s)^2 of the centres leaves such a box whole.
    assert stats.kstest(sides, lambda s: 6 * s**2 - 8 * s**3 + 3 * s**4).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_cutmix_is_drawn_as_often_as_asked_for(probability: float) -> None:
    count = 4000
    is_cut = numbers(0, range(0, 2 * count, 2), switch_probability=probability)[:, 0] == 0
    # Five standard deviations of a count of coins.
    assert abs(is_cut.sum() - count * probability) <= 5 * math.sqrt(count * probability * (1 - probability))


def test_boxes_are_centred_anywhere_and_never_leave_the_image() -> None:
    found = numbers(0, range(0, 4000, 2), mixup_alpha=0.0)
    weight, own, top, bottom, left, right = found.T
    assert (weight == 0).all()
    assert ((top >= 0) & (top <= bottom) & (bottom <= SIZE[0])).all()
    assert ((left >= 0) & (left <= right) & (right <= SIZE[1])).all()
    assert torch.allclose(own, 1 - (bottom - top) * (right - left) / math.prod(SIZE), atol=1e-6)
    assert {cut_box(SIZE, 0.999, (y, x))[::2] for y in range(SIZE[0]) for x in range(SIZE[1])} == {
        (y, x) for y in range(SIZE[0]) for x in range(SIZE[1])
    }


def test_a_pair_shares_its_numbers_and_other_pairs_seeds_and_epochs_have_others() -> None:
    found = numbers(0, range(200))
    assert torch.equal(found[::2], found[1::2])
    assert len(torch.unique(numbers(0, range(200), cutmix_alpha=0.0)[:, 1])) == 100
    assert not torch.equal(found, numbers(1, range(200)))
    # An epoch of 200 samples is over: its positions go on, so the pairs of the next one are drawn anew.
    assert not torch.equal(found, numbers(0, range(200, 400)))


def test_neighbouring_pairs_are_unrelated() -> None:
    shares = numbers(0, range(0, 8000, 2), cutmix_alpha=0.0)[:, 1].double()
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 of them.
    correlation = torch.corrcoef(torch.stack((shares[:-1], shares[1:])))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(shares))


# What they do


def mixed_one_by_one(images: Tensor, targets: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel by pixel in float64."""
    out, soft = images.double().clone(), targets.double().clone()
    for i, (weight, own, *box) in enumerate(mixing.double().tolist()):
        top, bottom, left, right = (int(edge) for edge in box)
        other = i + 1 if i % 2 == 0 else i - 1
        for y in range(top, bottom):
            for x in range(left, right):
                out[i, :, y, x] = weight * images[i, :, y, x].double() + (1 - weight) * images[other, :, y, x].double()
        soft[i] = own * targets[i].double() + (1 - own) * targets[other].double()
    return out, soft


def test_images_and_targets_are_mixed_as_their_numbers_say() -> None:
    images, targets = batch(12)
    mixing = numbers(0, range(12))
    assert 0 < (mixing[:, 0] == 0).sum() < 12  # both kinds are there
    found = mix(images, targets, mixing)
    for ours, exact in zip(found, mixed_one_by_one(images, targets, mixing), strict=True):
        # Two products and a sum of numbers below 5, in float32.
        assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-6)
    assert torch.allclose(found[1].sum(1), torch.ones(12), atol=1e-6)


def test_cutmix_copies_pixels_to_the_bit() -> None:
    images, targets = batch(2)
    box = torch.tensor([[0.0, 1 - 12 / 240, 2, 5, 6, 10]]).expand(2, 6)
    found, soft = mix(images, targets, box)
    expected = images.clone()
    expected[:, :, 2:5, 6:10] = images.flip(0)[:, :, 2:5, 6:10]
    assert torch.equal(found, expected)
    assert torch.allclose(soft, 0.95 * targets + 0.05 * targets.flip(0))


def test_alphas_of_zero_leave_everything_as_it_is() -> None:
    images, targets = batch(8)
    found, soft = mix(images, targets, numbers(0, range(8), mixup_alpha=0.0, cutmix_alpha=0.0))
    assert torch.equal(found, images)
    assert torch.equal(soft, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_and_targets_keep_their_type_and_what_came_in_is_not_changed(dtype: torch.dtype) -> None:
    images, targets = batch(4)
    images = images.to(dtype)
    before = images.clone(), targets.clone()
    found, soft = mix(images, targets, numbers(0, range(4)))
    assert (found.dtype, soft.dtype) == (dtype, torch.float32)
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


def test_mixing_and_smoothing_commute() -> None:
    images, _ = batch(8)
    labels = torch.arange(8) % 5
    mixing = numbers(0, range(8))
    _, smoothed_first = mix(images, soft_targets(labels, 5, 0.1), mixing)
    _, mixed_first = mix(images, soft_targets(labels, 5, 0.0), mixing)
    assert torch.allclose(smoothed_first, mixed_first * 0.9 + 0.1 / 5, atol=1e-6)


def test_smoothing_spreads_its_share_over_all_classes() -> None:
    found = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    assert torch.allclose(found, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(2, 1), (2, 4), (4, 3), (6, 2), (8, 3), (12, 2)])
def test_a_global_batch_cut_in_any_way_is_mixed_as_the_whole(micro_batch_size: int, world_size: int) -> None:
    global_batch_size, step = 24, 3
    images, targets = batch(global_batch_size)
    first = step * global_batch_size
    whole = mix(images, targets, numbers(7, range(first, first + global_batch_size)))
    for rank in range(world_size):
        for part in positions_of(step, global_batch_size, micro_batch_size, rank, world_size):
            rows = slice(part.start - first, part.stop - first)
            found = mix(images[rows], targets[rows], numbers(7, part))
            assert torch.equal(found[0], whole[0][rows])
            assert torch.equal(found[1], whole[1][rows])
