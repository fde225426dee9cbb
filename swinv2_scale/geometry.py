"""Window geometry in plain integers, for any number of axes.

The one rule for windows: a map no larger than the window is one tile and is never shifted; everything else is tiled by
full windows with smaller tiles at the border. Where the map is divisible this is the released behaviour to the bit;
where it isn't, nothing is padded, rolled or masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, ...]


def stage_maps(image_size: Size, patch_size: int, num_stages: int) -> tuple[Size, ...]:
    """Token map of each stage, highest resolution first.

    The image is cut into ``patch_size`` patches and every later stage halves the map; odd maps round up (they are
    zero-padded on the right and bottom before merging).
    """
    first = tuple(math.ceil(length / patch_size) for length in image_size)
    maps = [first]
    for _ in range(num_stages - 1):
        maps.append(tuple(math.ceil(length / 2) for length in maps[-1]))
    return tuple(maps)


def effective_window(window_size: Size, map_size: Size) -> Size:
    """The window really used on a map: clipped per axis."""
    return tuple(min(window, length) for window, length in zip(window_size, map_size, strict=True))


def effective_shift(window_size: Size, map_size: Size) -> Size:
    """The shift of every second block: half a window, but none on an axis that fits in one window."""
    return tuple(0 if length <= window else window // 2 for window, length in zip(window_size, map_size, strict=True))


def coordinate_divisor(pretrained_window: Size) -> Size:
    """What relative offsets are divided by before the log: the *pre-training* window minus one, never below one."""
    return tuple(max(length - 1, 1) for length in pretrained_window)


def spans(length: int, window: int, shift: int) -> list[tuple[int, int]]:
    """(start, size) of the tiles along one axis: a first tile of ``shift`` tokens, then windows, then the rest."""
    first = [(0, min(shift, length))] if shift else []
    return first + [(start, min(window, length - start)) for start in range(shift, length, window)]


def nearest_multiples(value: int, divisor: int) -> tuple[int, int]:
    """The multiples of ``divisor`` around ``value``, the lower one at least ``divisor`` itself."""
    lower = max(value // divisor, 1) * divisor
    return lower, lower + divisor


def as_size(value: int | Sequence[int], num_axes: int) -> Size:
    """One number for all axes, or one number each."""
    return (value,) * num_axes if isinstance(value, int) else tuple(value)
