"""Windows as tiles of the un-rolled map: which tokens attend to each other, and how to bring them together.

Shapes: B images, L tokens of one map (row-major), n tokens of a tile, N heads.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swinv2_scale.geometry import Size, effective_shift, effective_window, spans


@dataclass(frozen=True)
class TileGroup:
    """All tiles of one shape."""

    shape: Size  # (h, w) or (t, h, w), each at most the window
    tokens: Tensor  # int64 (num_tiles, n): positions in 0..L-1, row-major inside the tile

    @property
    def num_tiles(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[1])


@dataclass(frozen=True, eq=False)
class Tiling:
    """A partition of a map into tiles."""

    window_size: Size  # the effective window; what the bias table is made for
    groups: tuple[TileGroup, ...]  # every token in exactly one tile; at most 3 ** ndim groups
    order: Tensor  # int64 (L,): the groups' tokens, concatenated
    inverse: Tensor  # int64 (L,): order[inverse] == arange(L)


@lru_cache(maxsize=256)
def tiling(map_size: Size, window_size: Size, shifted: bool, device: torch.device) -> Tiling:
    """The tiles of one block's attention.

    Built in forward, cached by arguments: tensors made in a constructor would be cast by ``zero.Init``.

    Args:
        map_size: tokens along each axis.
        window_size: the configured window; clipped to the map.
        shifted: True for every second block of a stage.
    """
    with torch.inference_mode(False):
        window = effective_window(window_size, map_size)
        shift = effective_shift(window_size, map_size) if shifted else (0,) * len(map_size)
        position = torch.arange(math.prod(map_size), device="cpu").view(map_size)
        axes = [spans(length, w, s) for length, w, s in zip(map_size, window, shift, strict=True)]
        by_shape: dict[Size, list[Tensor]] = {}
        for tile in itertools.product(*axes):
            tokens = position[tuple(slice(start, start + size) for start, size in tile)].reshape(-1)
            by_shape.setdefault(tuple(size for _, size in tile), []).append(tokens)
        groups = tuple(
            TileGroup(shape, torch.stack(tokens).to(device)) for shape, tokens in sorted(by_shape.items(), reverse=True)
        )
        order = torch.cat([group.tokens.flatten() for group in groups])
        return Tiling(window, groups, order, torch.argsort(order))


class _Reorder(torch.autograd.Function):
    """Permute tokens. The gradient of a permutation is the inverse permutation: a gather, no float atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(1, ctx.inverse), None, None


def to_tiles(x: Tensor, tiles: Tiling) -> Tensor:
    """(B, L, ...) from map order to tile order."""
    return _Reorder.apply(x, tiles.order, tiles.inverse)  # type: ignore[no-any-return]


def to_map(x: Tensor, tiles: Tiling) -> Tensor:
    """(B, L, ...) from tile order back to map order."""
    return _Reorder.apply(x, tiles.inverse, tiles.order)  # type: ignore[no-any-return]


def tile_bias(table: Tensor, shape: Size, rows: slice = slice(None)) -> Tensor:
    """Expand a bias table for a tile: what each query adds to its score with each key.

    Args:
        table: (N, 2*w_0-1, 2*w_1-1, ..): entry [head, w_0-1+dy, ..] for the offset d = query - key.
        shape: the tile's shape, each axis at most the window.
        rows: which coordinates of the first axis the queries have; all keys are always there.

    Returns:
        (N, queries, keys). Made of strided views, so that the gradient is summed in a fixed order.
    """
    first, last, _ = rows.indices(shape[0])
    ranges = [(first, last - 1)] + [(0, length - 1) for length in shape[1:]]
    part = table
    for axis, (length, (low, high)) in enumerate(zip(shape, ranges, strict=True)):
        centre = table.shape[axis + 1] // 2
        part = part.narrow(axis + 1, centre + low - (length - 1), high - low + length)
    for axis, length in enumerate(shape):
        part = part.unfold(axis + 1, length, 1)
    # Along an unfolded axis the offset grows with the window position: keys come out last to first.
    num_axes = len(shape)
    part = part.flip([num_axes + 1 + axis for axis in range(num_axes)])  # torch.compile 2.15 takes *range() for more
    return part.reshape(table.shape[0], (last - first) * math.prod(shape[1:]), math.prod(shape))
