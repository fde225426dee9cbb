"""Crops, flips and resizes with every random number handed in; pixels stay uint8 until they are on the device."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swinv2_scale.geometry import Size

INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box of a share ``scale`` of the area and an aspect ratio in ``ratio`` (log-uniform).

    Returns:
        (left, top, right, bottom) in pixels. After ten boxes that don't fit, the largest central one that does: the
        rule of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(min(width, round(height * aspect)), 1), max(min(height, round(width / aspect)), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    rng: np.random.Generator,
) -> Image.Image:
    """Crop a random box and resize it to ``size`` (height, width)."""
    box = crop_box(image.width, image.height, scale, ratio, rng)
    return image.resize((size[1], size[0]), INTERPOLATION[interpolation], box=box)


def central_resized_crop(image: Image.Image, size: Size, interpolation: str, share: float = 1.0) -> Image.Image:
    """The largest central box of the target's shape, resized to ``size`` (height, width); nothing is random.

    Args:
        share: of that box's sides, to cut its border off.
    """
    aspect = size[1] / size[0]
    w, h = share * min(image.width, image.height * aspect), share * min(image.height, image.width / aspect)
    left, top = (image.width - w) / 2, (image.height - h) / 2
    return image.resize((size[1], size[0]), INTERPOLATION[interpolation], box=(left, top, left + w, top + h))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (C, H, W), contiguous."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)
