"""Which box of an image a sample shows, with every random number handed in; pixels are normalised on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swinv2_scale.config.tasks import ClassificationConfig, CropMode, SimMIMConfig
from swinv2_scale.data.images.decode import Picture
from swinv2_scale.data.images.resize import mirrored
from swinv2_scale.draws import Draw
from swinv2_scale.geometry import Size

#: An image of 1 x 89,000,000 pixels, its shorter side resized to 256 px, would take terabytes.
_MOST_RESIZED = 2**26


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: Iterator[float]
) -> tuple[int, int, int, int]:
    """A random box of a share ``scale`` of the area and an aspect ratio in ``ratio`` (log-uniform).

    Args:
        numbers: uniform in [0, 1).

    Returns:
        (left, top, right, bottom) in pixels. After ten boxes that don't fit, the largest central one that does: the
        rule of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * next(numbers))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * next(numbers))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(next(numbers) * (width - w + 1)), int(next(numbers) * (height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(min(width, round(height * aspect)), 1), max(min(height, round(width / aspect)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    picture: Picture,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    numbers: Iterator[float],
) -> NDArray[Any]:
    """A random box resized to ``size`` (height, width), as (C, H, W)."""
    return picture.resized(crop_box(picture.width, picture.height, scale, ratio, numbers), size, interpolation)


def training_crop(picture: Picture, size: Size, task: SimMIMConfig | ClassificationConfig, draw: Draw) -> NDArray[Any]:
    """A sample's random crop, mirrored or not, as (C, H, W)."""
    numbers = draw.uniforms("crop")
    pixels = random_resized_crop(picture, size, task.crop_scale, task.crop_ratio, task.interpolation, numbers)
    return mirrored(pixels) if next(draw.uniforms("flip")) < task.flip_probability else pixels


def central_resized_crop(picture: Picture, size: Size, interpolation: str) -> NDArray[Any]:
    """The largest central box of the target's shape, resized to ``size`` (height, width), as (C, H, W)."""
    aspect = size[1] / size[0]
    w, h = min(picture.width, picture.height * aspect), min(picture.height, picture.width / aspect)
    left, top = (picture.width - w) / 2, (picture.height - h) / 2
    return picture.resized((left, top, left + w, top + h), size, interpolation)


def evaluation_crop(
    picture: Picture, size: Size, crop_pct: float, crop_mode: CropMode, interpolation: str
) -> NDArray[Any]:
    """What a classifier sees of an image: bit by bit what torchvision's transforms make of Pillow's image.

    ``center``: Resize(int(size / crop_pct)), of the shorter side, then CenterCrop(size); ``squash``: Resize((size,
    size)), which sees all of the image and changes its shape. For targets that aren't square the sides become the
    least that cover both ``int(side / crop_pct)``.

    Args:
        size: (height, width) of the target.
        crop_pct: at most 1; only ``center`` has one.

    Returns:
        (C, H, W) of the format's type.

    Raises:
        SampleError: the image doesn't decode.
    Source: data/build.py of the released code: 256/224 is 1/0.875, and both round alike for every size up to 4096.
    """
    width, height = picture.width, picture.height
    whole = (0.0, 0.0, float(width), float(height))
    if crop_mode == "squash":
        return picture.resized(whole, size, interpolation)
    covered = [int(side / crop_pct) for side in size]
    if covered[1] * height >= covered[0] * width:
        resized = (int(covered[1] * height / width), covered[1])
    else:
        resized = (covered[0], int(covered[0] * width / height))
    top, left = (round((found - side) / 2) for found, side in zip(resized, size, strict=True))
    if resized[0] * resized[1] > _MOST_RESIZED:  # of a strip; the box that is left of it, to a level or so
        steps = width / resized[1], height / resized[0]
        box = (left * steps[0], top * steps[1], (left + size[1]) * steps[0], (top + size[0]) * steps[1])
        return picture.resized(box, size, interpolation)
    # Pillow's filters start at the box's edge: the box alone, resized, would differ in the last bit.
    pixels = picture.resized(whole, resized, interpolation)
    return np.ascontiguousarray(pixels[:, top : top + size[0], left : left + size[1]])


def normalised(images: Tensor, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> Tensor:
    """Float32 of (value / the type's largest - mean) / std; float32 values are taken as they are."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
        for values in (pixel_mean, pixel_std)
    )
    largest = 1 if images.dtype.is_floating_point else torch.iinfo(images.dtype).max
    return (images.float() / largest - mean) / std
