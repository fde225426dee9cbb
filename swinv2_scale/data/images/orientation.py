"""Which way up: a camera's note in EXIF, obeyed as viewers do it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from swinv2_scale.data.images.resize import Box

#: EXIF orientation -> (swap rows and columns, then mirror columns, then mirror rows); 1 is upright already.
_TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_UPRIGHT = (False, False, False)


def orientation_of(image: Image.Image) -> int:
    """1 to 8, from the image's header; 1 where the note is missing or unreadable: it isn't a part of the picture."""
    if image.format == "TIFF":
        return 1  # Pillow turns those itself
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd blocks, from every worker
            noted = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged note raises a dozen types
        return 1
    return int(noted) if noted in _TURNS else 1


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """(width, height) as a person sees it."""
    return (height, width) if _TURNS.get(orientation, _UPRIGHT)[0] else (width, height)


def upright(pixels: NDArray[Any], orientation: int, rows_axis: int = 0) -> NDArray[Any]:
    """Stored pixels turned upright; rows and columns are the axes ``rows_axis`` and the one after it."""
    swap, mirror_columns, mirror_rows = _TURNS.get(orientation, _UPRIGHT)
    if swap:
        pixels = pixels.swapaxes(rows_axis, rows_axis + 1)
    flipped = (rows_axis,) * mirror_rows + (rows_axis + 1,) * mirror_columns
    return np.flip(pixels, flipped) if flipped else pixels


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Where an upright box lies in the stored pixels.

    Args:
        width: upright, as ``height``.
    """
    swap, mirror_columns, mirror_rows = _TURNS.get(orientation, _UPRIGHT)
    left, top, right, bottom = box
    if mirror_columns:
        left, right = width - right, width - left
    if mirror_rows:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if swap else (left, top, right, bottom)
