"""Bytes to pixels. An allow-list of image formats and nothing else: no byte of a shard is ever run."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from swinv2_scale.data.reader import Record
from swinv2_scale.errors import DataError

#: File extension -> Pillow's name of the only format that it may hold.
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def decode_image(record: Record, channels: int) -> Image.Image:
    """The record's image as ``L`` (one channel) or ``RGB`` (three).

    Raises:
        DataError: no image, or one that doesn't decode; names the sample and the cause.
    """
    extension = next((name for name in record.files if name in IMAGE_FORMATS), None)
    if extension is None:
        found = ", ".join(record.files) or "nothing"
        raise DataError(f"sample {record.id} has no image: it holds {found}, images are {', '.join(IMAGE_FORMATS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(record.files[extension]), formats=[IMAGE_FORMATS[extension]])
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"sample {record.id}: {extension} doesn't decode: {error}") from error
