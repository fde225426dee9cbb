"""Bytes to pixels. An allow-list of image formats and nothing else: no byte of a shard is ever run."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from swinv2_scale.data.reader import Record
from swinv2_scale.errors import DataError

#: File extension -> Pillow's name of the only format that it may hold.
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def decode_image(record: Record, channels: int, upright: bool = False) -> Image.Image:
    """The record's image as ``L`` (one channel) or ``RGB`` (three).

    Args:
        upright: turn it as the camera noted; training takes pixels as they are stored, as everybody's does.

    Raises:
        DataError: no image, or one that doesn't decode; names the sample and the cause.
    """
    extension = next((name for name in record.files if name in IMAGE_FORMATS), None)
    if extension is None:
        found = ", ".join(record.files) or "nothing"
        raise DataError(f"sample {record.name} has no image: it holds {found}, images are {', '.join(IMAGE_FORMATS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            stored = Image.open(io.BytesIO(record.files[extension]), formats=[IMAGE_FORMATS[extension]])
            image = ImageOps.exif_transpose(stored) if upright else stored
            return _eight_bits(image).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow raises a dozen types on damaged files; all mean the same here
        raise DataError(f"sample {record.name}: {extension} doesn't decode: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey at 255 instead of scaling it, and has no range for 32-bit pixels."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels ({image.mode}) have no known range")
    return image
