"""Images as bytes, and what comes out of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from swinv2_scale.data.images.decode import Picture, PixelFormat, open_image
from swinv2_scale.data.shards.reader import Record


def smooth(mode: str = "RGB", width: int = 24, height: int = 16) -> Image.Image:
    """A gradient: lossy formats keep it within a few levels."""
    y, x = np.mgrid[:height, :width]
    planes = [8 * x, 12 * y, 255 - 5 * (x + y)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Different for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image | np.ndarray, fmt: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def opened(extension: str, data: bytes, channels: int = 3, **fields: Any) -> Picture:
    return open_image(Record("a", "000000.tar/a", {extension: data}), PixelFormat(channels, **fields))


def decoded(extension: str, data: bytes, channels: int = 3, **fields: Any) -> np.ndarray:
    """(H, W, C) at its own size; (H, W) of one channel."""
    picture = opened(extension, data, channels, **fields)
    box = (0, 0, picture.width, picture.height)
    pixels = picture.resized(box, (picture.height, picture.width), "bilinear")
    assert pixels.flags.c_contiguous
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)
