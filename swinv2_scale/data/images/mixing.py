"""mixup and cutmix of neighbours: the sample at position p of the training is mixed with the one at p ^ 1.

Both lie in the same micro-batch on any number of ranks, as long as micro-batches are even. The numbers of a pair are a
function of (seed, position // 2), drawn where the samples are read, and ride with the batch: no rank, no partner and no
device has a say in them, and the training process neither draws nor waits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swinv2_scale.draws import Draw
from swinv2_scale.geometry import Size


def symmetric_beta(alpha: float, first: float, second: float) -> float:
    """A number distributed as Beta(alpha, alpha), from two uniform numbers of [0, 1).

    Source: Devroye, Random variate generation in one line of code (1996), after Bailey's polar method. No rejection,
    so two numbers always are enough; written so that nothing overflows for small alphas.
    """
    power = (1.0 - first) ** (1.0 / alpha)
    cosine = math.cos(2.0 * math.pi * second)
    square = (1.0 - power) * cosine**2
    return 0.5 * (1.0 + math.copysign(math.sqrt(square / (square + power)), cosine))


def cut_box(size: Size, kept: float, centre: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of cutmix: of the image's shape and a share ``1 - kept`` of its area, cut off at its borders.

    Args:
        size: (height, width).
        centre: (y, x) in pixels.

    Returns:
        (top, bottom, left, right) in pixels.
    Source: CutMix (arXiv 1905.04899) sec. 3.1; timm cuts odd lengths a pixel shorter.
    """
    edges = []
    for length, middle in zip(size, centre, strict=True):
        cut = int(length * math.sqrt(1.0 - kept))
        edges += [max(middle - cut // 2, 0), min(middle + (cut + 1) // 2, length)]
    top, bottom, left, right = edges
    return top, bottom, left, right


def draw_mixing(
    seed: int,
    position: int,
    size: Size,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_probability: float,
    probability: float = 1.0,
) -> NDArray[np.float32]:
    """How the sample at a position is mixed with its neighbour; the same numbers for both.

    Args:
        position: in the endless order of the training, so an epoch's pairs have other numbers than the last one's.
        size: (height, width) of the images.
        mixup_alpha, cutmix_alpha: of the Beta distribution of the sample's own share; 0 switches one off, or both.
        switch_probability: of cutmix, where neither is off.
        probability: that the pair is mixed at all.

    Returns:
        float32 (6,): the sample's own weight inside a box, its own weight in the target, and the box (top, bottom,
        left, right) in pixels. With mixup the box is the whole image; with cutmix the weight inside is 0, and the
        target's is the area that is really left.
    """
    rng = Draw(seed, "pair", str(position // 2)).generator("mixing")
    switch, first, second, *middle, whether = rng.random(6).tolist()
    is_cut = cutmix_alpha > 0 and (mixup_alpha <= 0 or switch < switch_probability)
    alpha = cutmix_alpha if is_cut else mixup_alpha
    share = symmetric_beta(alpha, first, second) if alpha > 0 and whether < probability else 1.0
    height, width = size
    if not is_cut:
        return np.array((share, share, 0, height, 0, width), np.float32)
    box = cut_box(size, share, (int(middle[0] * height), int(middle[1] * width)))
    area = (box[1] - box[0]) * (box[3] - box[2])
    return np.array((0.0, 1.0 - area / (height * width), *box), np.float32)


def soft_targets(labels: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """float32 (B, K): of each sample ``label_smoothing`` is spread over all classes, the rest is its label's.

    Args:
        labels: int64 (B,).
    """
    one_hot = F.one_hot(labels, num_classes).to(torch.float32)
    return one_hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def mix(images: Tensor, targets: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes samples 0 and 1, 2 and 3, ... of a micro-batch.

    Args:
        images: floating point (B, C, H, W), B even, the first at an even position.
        targets: floating point (B, K), smoothed or not: mixing commutes with it.
        mixing: float32 (B, 6) from ``draw_mixing``, alike within each pair.

    Returns:
        Images and targets, of the same shapes, types and device.
    """
    assert len(images) % 2 == 0, "config/rules.py refuses odd micro-batches"
    height, width = images.shape[-2:]
    inside, own, *box = mixing.unbind(1)
    top, bottom, left, right = (edge[:, None] for edge in box)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    is_inside = rows[:, None, :, None] & columns[:, None, None, :]
    weight = torch.where(is_inside, inside[:, None, None, None], 1.0)
    return _blend(images, weight), _blend(targets, own[:, None])


def _blend(values: Tensor, weight: Tensor) -> Tensor:
    """Of each sample ``weight``, of its neighbour the rest; exact where the weight is 0 or 1."""
    neighbours = values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)
    return values * weight.to(values.dtype) + neighbours * (1.0 - weight).to(values.dtype)
