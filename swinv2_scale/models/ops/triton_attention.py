"""``triton``: window attention on a GPU in kernels of its own, forward and backward. Experimental: see below.

No tensor of (tiles, heads, n, n) and no expanded bias, in neither direction. Kept for backward: qkv, out, the logsumexp
of every token and head, and the small arguments. Scratch for the table's gradient has a limit. No atomics: same input,
same launches, same bits.

It has never run on a GPU. It has run in Triton's interpreter (tests/unit/models/), against brute force, and
is compiled for sm_90 by a test. So ``auto`` doesn't choose it, and its launches (triton_launches.py) are not tuned.

Operands are rounded to qkv's type where a matrix unit wants it: weights before they meet v, and dS before it meets q
and k (docs/numerics.md). q and k shorter than 2**-62 count as zero.

Letters: B images, L tokens of one map, N heads, D head_dim, n tokens of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from swinv2_scale.errors import ConfigError
from swinv2_scale.geometry import Size
from swinv2_scale.models.ops import triton_kernels as kernels
from swinv2_scale.models.ops.triton_launches import Launch, Launches, block_length, launches_for
from swinv2_scale.models.tiles import Tiling

LARGEST_HEAD_DIM = 128
TYPES = (torch.float32, torch.bfloat16)
#: A product and a sum in one instruction, which rounds once less. Said, as Triton's default is about to change (3.9).
FUSED = {"enable_fp_fusion": True}


def attend(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling, launches: Launches | None = None
) -> Tensor:
    """See the contract in attend.py. ``launches``: others than the table's, for all shapes of tile.

    Raises:
        ConfigError: a CPU (outside Triton's interpreter), another type than float32 and bfloat16, a head_dim
            above 128, or more than 2**31 numbers for one image.
    """
    _refuse(qkv)
    shapes = [number for group in tiles.groups for number in (group.num_tiles, *group.shape)]
    numbers = launches.as_numbers() if launches else []
    out: Tensor = _forward(qkv, logit_scale, bias_table, tiles.order, shapes, numbers)[0]
    return out


def _refuse(qkv: Tensor) -> None:
    """What the kernels can't do."""
    problem = ""
    if qkv.device.type == "cpu" and not kernels.INTERPRETED.value:
        problem = "the model is on a CPU, and Triton's kernels run on GPUs"
    elif qkv.dtype not in TYPES:
        problem = f"it is given {qkv.dtype}, and takes float32 and bfloat16"
    elif qkv.shape[-1] > LARGEST_HEAD_DIM:
        problem = f"a head has {qkv.shape[-1]} channels, and it takes up to {LARGEST_HEAD_DIM}"
    elif math.prod(qkv.shape[1:]) >= 2**31:
        problem = f"one image's qkv are {math.prod(qkv.shape[1:]):.1e} numbers, and it takes fewer than 2**31"
    if problem:
        raise ConfigError(f"attention backend triton: {problem}", "set model.attention.backend to another one")


@dataclass(frozen=True)
class _Tiles:
    """All tiles of one shape, as the kernels are told of them."""

    num_tiles: int
    shape: Size
    start: int  # the first one's first position
    sides: Size  # of the bias table

    @property
    def num_tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def strides(self) -> Size:
        """Of the flattened table."""
        return tuple(math.prod(self.sides[axis + 1 :]) for axis in range(len(self.sides)))

    @property
    def centre(self) -> int:
        """The place of offset zero in the flattened table."""
        return sum(side // 2 * stride for side, stride in zip(self.sides, self.strides, strict=True))

    def sizes(self, qkv: Tensor) -> tuple[int, ...]:
        """The kernels' SIZES."""
        length, heads = qkv.shape[1], qkv.shape[3]
        return length, heads, self.num_tokens, self.num_tiles, self.start, self.centre, math.prod(self.sides)

    def is_full(self, launch: Launch) -> bool:
        return self.num_tokens % launch.block_m == 0 and self.num_tokens % launch.block_n == 0


def _groups(shapes: list[int], bias_table: Tensor) -> Iterator[_Tiles]:
    """What attend() has flattened: (num_tiles, *shape) of every group."""
    sides = tuple(bias_table.shape[1:])
    start = 0
    for at in range(0, len(shapes), 1 + len(sides)):
        group = _Tiles(shapes[at], tuple(shapes[at + 1 : at + 1 + len(sides)]), start, sides)
        yield group
        start += group.num_tiles * group.num_tokens


@lru_cache(maxsize=256)
def _codes(shape: Size, strides: Size, device: torch.device) -> Tensor:
    """int32 (n,): coordinates in the tile times strides of the table."""
    with torch.inference_mode(False):
        code = torch.zeros(1, dtype=torch.int32)
        for length, stride in zip(shape, strides, strict=True):
            code = (code[:, None] + torch.arange(length, dtype=torch.int32) * stride).flatten()
        return code.to(device)


def _launches(numbers: list[int], qkv: Tensor, num_tokens: int) -> Launches:
    if numbers:
        return Launches.from_numbers(numbers)
    return launches_for(qkv.shape[-1], qkv.dtype.itemsize, num_tokens)


def _constants(launch: Launch, group: _Tiles, head_dim: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "dim": head_dim,
        "width": block_length(head_dim),
        "block_m": launch.block_m,
        "block_n": launch.block_n,
        "full": group.is_full(launch),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **FUSED,
    }


def _inverse_norms(qkv: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """1/|q| and 1/|k|, (B, N, L) float32 by position; computed again in backward rather than kept."""
    batch, length, _, heads, dim = qkv.shape
    rq, rk = (torch.empty(batch, heads, length, dtype=torch.float32, device=qkv.device) for _ in range(2))
    kernels.inverse_norms[(triton.cdiv(length, 64), heads, batch)](
        qkv, order, rq, rk, length, heads, dim=dim, width=block_length(dim), block=64, **FUSED
    )
    return rq, rk


@torch.library.custom_op("swinv2_scale::triton_attention", mutates_args=())
def _forward(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, order: Tensor, shapes: list[int], launches: list[int]
) -> tuple[Tensor, Tensor]:
    """out (B, L, N, D) by token and lse (B, N, L) by position."""
    qkv = qkv.contiguous()
    batch, _, _, heads, dim = qkv.shape
    out, lse = _forward_shapes(qkv, logit_scale, bias_table, order, shapes, launches)
    scale, table = logit_scale.float().contiguous(), (bias_table.float() * kernels.LOG2E.value).contiguous()
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        rq, rk = _inverse_norms(qkv, order)
        for group in _groups(shapes, bias_table):
            launch = _launches(launches, qkv, group.num_tokens).forward.within(group.num_tokens)
            grid = (triton.cdiv(group.num_tokens, launch.block_m) * heads * group.num_tiles * batch,)
            code = _codes(group.shape, group.strides, qkv.device)
            kernels.forward[grid](
                *(qkv, order, code, rq, rk, scale, table, out, lse), *group.sizes(qkv), **_constants(launch, group, dim)
            )
    return out, lse


@_forward.register_fake
def _forward_shapes(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, order: Tensor, shapes: list[int], launches: list[int]
) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, dim = qkv.shape
    return qkv.new_empty(batch, length, heads, dim), qkv.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("swinv2_scale::triton_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    order: Tensor,
    out: Tensor,
    lse: Tensor,
    shapes: list[int],
    launches: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, logit_scale and bias_table."""
    qkv, dout = qkv.contiguous(), dout.contiguous()
    batch, _, _, heads, dim = qkv.shape
    scale, table = logit_scale.float().contiguous(), (bias_table.float() * kernels.LOG2E.value).contiguous()
    dqkv, dscale, dtable, delta = map(torch.empty_like, (qkv, scale, table, lse))
    dscale.zero_()
    dtable.zero_()
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        rq, rk = _inverse_norms(qkv, order)
        for group in _groups(shapes, bias_table):
            chosen = _launches(launches, qkv, group.num_tokens)
            code = _codes(group.shape, group.strides, qkv.device)
            read = (qkv, order, code, rq, rk, scale, table)
            tiles = batch * group.num_tiles
            # First: it also corrects delta, which the others read.
            launch = chosen.query_gradient.within(group.num_tokens)
            kernels.query_gradient[(triton.cdiv(group.num_tokens, launch.block_m) * heads * tiles,)](
                *(*read, out, dout, lse, delta, dqkv), *group.sizes(qkv), **_constants(launch, group, dim)
            )
            launch = chosen.key_gradient.within(group.num_tokens)
            kernels.key_gradient[(triton.cdiv(group.num_tokens, launch.block_n) * heads * tiles,)](
                *(*read, dout, lse, delta, dqkv), *group.sizes(qkv), **_constants(launch, group, dim)
            )
            _add_score_gradients(dscale, dtable, (*read, dout, lse, delta), group, chosen)
    return dqkv, dscale.to(logit_scale.dtype), dtable.to(bias_table.dtype)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    order: Tensor,
    out: Tensor,
    lse: Tensor,
    shapes: list[int],
    launches: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), logit_scale.new_empty(logit_scale.shape), bias_table.new_empty(bias_table.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, logit_scale, bias_table, order, ctx.shapes, ctx.launches = inputs
    ctx.save_for_backward(qkv, logit_scale, bias_table, order, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradients = _backward(dout, *ctx.saved_tensors, ctx.shapes, ctx.launches)
    return (*gradients, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _add_score_gradients(
    dscale: Tensor, dtable: Tensor, read: tuple[Tensor, ...], group: _Tiles, launches: Launches
) -> None:
    """dtable (N, ..) += dS, summed over images, tiles, and pairs of tokens of one offset; dscale (N,) += dS * cos.

    Two kernels: dS summed over what shares its table entries, into blocks; the blocks along their diagonals. As many
    blocks, over classes and heads, at once as ``max_scratch_bytes`` holds.
    """
    qkv = read[0]
    heads, tokens = qkv.shape[3], group.num_tokens
    launch = launches.table_gradient.within(tokens)
    slabs, height, breadth = (*group.shape, 1, 1)[:3]
    cut = TableCut.of(tokens, slabs, qkv.shape[0] * group.num_tiles, heads, launch, launches)
    stride0, stride1, _ = (*group.strides, 1, 1)[:3]
    columns = (2 * height - 1) * (2 * breadth - 1)
    block_c = min(64, block_length(columns))
    sizes = group.sizes(qkv)
    num_blocks = cut.num_parts * cut.heads_at_once * cut.classes_at_once
    blocks = dtable.new_empty(num_blocks * launch.block_m * launch.block_n)
    for first_head in range(0, heads, cut.heads_at_once):
        num_heads = min(cut.heads_at_once, heads - first_head)
        for first_class in range(0, cut.num_classes, cut.classes_at_once):
            num_classes = min(cut.classes_at_once, cut.num_classes - first_class)
            apart = (cut.rows_apart, cut.columns_apart, first_class, num_classes)
            shares = dscale.new_empty(cut.num_parts, num_heads, num_classes)
            kernels.table_blocks[(shares.numel(),)](
                *(*read, blocks, shares, *sizes, qkv.shape[0], cut.share, first_head, num_heads, *apart),
                **_constants(launch, group, qkv.shape[4]),
            )
            dscale[first_head : first_head + num_heads] += shares.sum((0, 2))
            kernels.table_sum[(triton.cdiv(columns, block_c), 2 * slabs - 1, num_heads)](
                *(blocks, dtable, tokens, slabs, height, breadth, sizes[-1], stride0, stride1, group.centre),
                *(cut.num_parts, first_head, num_heads, *apart),
                block_m=launch.block_m,
                block_n=launch.block_n,
                block_x=16,
                block_c=block_c,
                **FUSED,
            )


@dataclass(frozen=True)
class TableCut:
    """How the blocks of one tile's dS fall into classes (kernels.table_blocks), and how many are summed at once.

    Attributes:
        rows_apart, columns_apart: blocks from one of a class to the next.
        num_parts: all tiles are summed in so many parts, of ``share`` tiles each.
    """

    rows_apart: int
    columns_apart: int
    num_classes: int
    num_parts: int
    share: int
    heads_at_once: int
    classes_at_once: int

    @staticmethod
    def of(tokens: int, slabs: int, tiles: int, heads: int, launch: Launch, launches: Launches) -> TableCut:
        """Of tiles of ``slabs`` steps along their first axis; ``tiles`` over all images."""
        period = math.lcm(launch.block_m, launch.block_n, tokens // slabs)
        rows_apart, columns_apart = period // launch.block_m, period // launch.block_n
        num_rows, num_columns = triton.cdiv(tokens, launch.block_m), triton.cdiv(tokens, launch.block_n)
        num_classes = min(rows_apart, num_rows) * num_columns + max(0, num_rows - rows_apart) * columns_apart
        blocks = max(1, launches.max_scratch_bytes // (4 * launch.block_m * launch.block_n))  # in float32
        wanted = triton.cdiv(launches.num_programs, heads * num_classes)
        share = triton.cdiv(tiles, max(1, min(wanted, tiles, blocks // (heads * num_classes))))
        num_parts = triton.cdiv(tiles, share)
        classes_at_once = min(num_classes, max(1, blocks // num_parts))
        heads_at_once = min(heads, max(1, blocks // (num_parts * classes_at_once)))
        return TableCut(rows_apart, columns_apart, num_classes, num_parts, share, heads_at_once, classes_at_once)
