"""Cut a box out of pixels and resize it: exactly as Pillow does, or fast with OpenCV.

Boxes are (left, top, right, bottom) in pixels, fractions allowed; sizes are (height, width); results are (C, H, W).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swinv2_scale.geometry import Size

Box = tuple[float, float, float, float]
INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# A loader has a process for each core; OpenCV's threads on top of them only wait for each other.
cv2.setNumThreads(0)


def resized_image(image: Image.Image, box: Box, size: Size, interpolation: str) -> NDArray[np.uint8]:
    """An 8-bit image by Pillow, whose filters widen with the scale so that nothing is aliased: the reference."""
    pixels = np.asarray(image.resize((size[1], size[0]), INTERPOLATION[interpolation], box=box))
    return channels_first(pixels)


def resized_array(array: NDArray[Any], box: Box, size: Size, interpolation: str) -> NDArray[Any]:
    """(H, W, C) of any type that pixels have, channel by channel with the same filters in float32.

    Returns:
        (C, H, W) of the array's type; integers are rounded and kept in their range (bicubic overshoots).
    """
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(array[..., channel], np.float32)).resize(
                (size[1], size[0]), INTERPOLATION[interpolation], box=box
            )
        )
        for channel in range(array.shape[2])
    ]
    found = np.stack(planes)
    if np.issubdtype(array.dtype, np.integer):
        found = np.rint(found).clip(0, np.iinfo(array.dtype).max).astype(array.dtype)
    return found


def resized_fast(array: NDArray[np.uint8], box: Box, size: Size, interpolation: str) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) or (H, W) by bilinear interpolation; bicubic only enlarges.

    Between a half and the full size bilinear neighbours are nearly what Pillow's wider filters average, at a tenth of
    their time (benchmarks/results/data_epyc-2core_*.md); an axis that shrinks further is blurred first.
    """
    height, width = size
    left, top, right, bottom = (int(edge) for edge in box)
    is_whole = box == (left, top, right, bottom)
    if is_whole:
        array, box = array[top:bottom, left:right], (0, 0, right - left, bottom - top)
    steps = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    if max(steps) >= 2:
        # An odd kernel about as wide as a step, with a standard deviation of a quarter of it.
        kernel = [2 * int(step / 2) + 1 for step in steps]
        array = np.asarray(cv2.GaussianBlur(array, kernel, sigmaX=steps[0] / 4, sigmaY=steps[1] / 4), np.uint8)
    flags = cv2.INTER_CUBIC if interpolation == "bicubic" and max(steps) < 1 else cv2.INTER_LINEAR
    if is_whole:
        return channels_first(cv2.resize(array, (width, height), interpolation=flags))
    # A third of that speed, but it can start between two pixels.
    start = [box[axis] + steps[axis] / 2 - 0.5 for axis in (0, 1)]  # of the first pixel's centre
    matrix = np.array([[steps[0], 0, start[0]], [0, steps[1], start[1]]])
    flags |= cv2.WARP_INVERSE_MAP
    return channels_first(cv2.warpAffine(array, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))


def channels_first(pixels: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) to (C, H, W), contiguous."""
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels[None])
    planes = np.empty((pixels.shape[2], *pixels.shape[:2]), pixels.dtype)
    cv2.split(pixels, list(planes))  # a third of the time of numpy's transposed copy
    return planes


def mirrored(pixels: NDArray[Any]) -> NDArray[Any]:
    """(C, H, W) with left and right exchanged, contiguous."""
    channels, height, width = pixels.shape
    # A sixth of the time of numpy's copy with a negative stride.
    flipped = cv2.flip(pixels.reshape(channels * height, width), 1)
    return np.asarray(flipped).reshape(pixels.shape)
