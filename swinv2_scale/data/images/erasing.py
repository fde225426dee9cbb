"""Random erasing: boxes of an image that show nothing of it. Drawn where samples are read, filled on the device.

Source: Random Erasing (arXiv 1708.04896), with the values of timm 1.0.31, whose recipe Swin follows: boxes of 2 % to a
third of the image, sides in a ratio of 0.3 to 1 / 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swinv2_scale.draws import Draw, normal
from swinv2_scale.geometry import Size

_AREA = (0.02, 1 / 3)
_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))


def draw_boxes(draw: Draw, size: Size, probability: float, most_boxes: int) -> NDArray[np.int32]:
    """The boxes that are erased in a sample; those that aren't used are empty.

    Args:
        size: (height, width) of the image.
        probability: that there is any.
        most_boxes: how many there are at most, as likely as fewer; they share the area.

    Returns:
        int32 (most_boxes, 4): (top, bottom, left, right) in pixels.
    """
    boxes = np.zeros((most_boxes, 4), np.int32)
    numbers = draw.uniforms("erasing")
    if next(numbers) >= probability:
        return boxes
    count = 1 + int(next(numbers) * most_boxes)
    for box in boxes[:count]:
        box[:] = _box(size, count, numbers)
    return boxes


def _box(size: Size, count: int, numbers: Iterator[float]) -> tuple[int, int, int, int]:
    """Empty after ten that don't fit."""
    height, width = size
    for _ in range(10):
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * next(numbers)) / count
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * next(numbers))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(next(numbers) * (height - h + 1)), int(next(numbers) * (width - w + 1))
            return top, top + h, left, left + w
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor, keys: Tensor, mode: str) -> Tensor:
    """Fill the boxes of normalised images.

    Args:
        images: floating point (B, C, H, W), of about zero mean and unit variance.
        boxes: int (B, N, 4) from ``draw_boxes``.
        keys: int64 (B,) that noise is drawn from, a function of each alone.
        mode: ``const``: 0, ``rand``: one normal number for each channel of a box (a later one lies on top), ``pixel``:
            one for each channel of a pixel.
    """
    height, width = images.shape[-2:]
    top, bottom, left, right = (edge[..., None] for edge in boxes.unbind(-1))
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    is_inside = (rows[..., :, None] & columns[..., None, :])[:, :, None]  # (B, N, 1, H, W)
    if mode == "const":
        return images.masked_fill(is_inside.any(1), 0)
    if mode == "pixel":
        noise = normal(keys, math.prod(images.shape[1:])).view(images.shape)
        return torch.where(is_inside.any(1), noise.to(images.dtype), images)
    num_boxes, channels = boxes.shape[1], images.shape[1]
    colours = normal(keys, num_boxes * channels).view(-1, num_boxes, channels, 1, 1).to(images.dtype)
    for number in range(num_boxes):
        images = torch.where(is_inside[:, number], colours[:, number], images)
    return images
