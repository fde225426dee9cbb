"""Attention in plain torch: ``eager``, the reference, ``sequential``, the paper's way to fit 1536x1536, and ``sdpa``.

Letters: B images, L tokens of one map, N heads, D head_dim, n tokens of a tile, T = images x tiles of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from swinv2_scale.geometry import Size
from swinv2_scale.models.precision import wide_type, without_autocast
from swinv2_scale.models.tiles import TileGroup, Tiling, tile_bias, to_map, to_tiles


def eager(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling) -> Tensor:
    """All tiles of one shape at once, everything in float32 (float64 for float64). See the contract in attend.py."""
    with without_autocast(qkv.device):
        pieces = [
            _from_heads(_tile_attention(q, k, v, logit_scale, tile_bias(bias_table, group.shape)), qkv)
            for group, (q, k, v) in _groups(to_tiles(qkv, tiles), tiles)
        ]
        return to_map(torch.cat(pieces, 1), tiles)


def sequential(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling, *, max_score_bytes: int) -> Tensor:
    """The same numbers piece by piece, keeping only the inputs for backward, where each piece is recomputed.

    Tiles are split first, then heads, then query rows, until the scores and the expanded bias of one piece fit in
    ``max_score_bytes`` (or one row of one head of one tile is left).
    Source: sec. 3.5 of the paper names "sequential self-attention computation" without saying what is sequential; a
    loop without recomputation saves nothing in training.
    """
    with without_autocast(qkv.device):
        ordered = to_tiles(qkv, tiles)
        pieces = [
            _Sequential.apply(q, k, v, logit_scale, bias_table, group.shape, max_score_bytes)
            for group, (q, k, v) in _groups(ordered, tiles)
        ]
        return to_map(torch.cat([_from_heads(piece, qkv) for piece in pieces], 1), tiles)


def sdpa(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling) -> Tensor:
    """torch's scaled_dot_product_attention, in float32: without gradients its fused kernels never hold all scores.

    With gradients it is the math kernel: the fused ones have no gradient for a bias on CPUs, and on CUDA add it up in
    an order that changes.
    """
    with without_autocast(qkv.device):
        pieces = []
        for group, (q, k, v) in _groups(to_tiles(qkv, tiles), tiles):
            bias = tile_bias(bias_table, group.shape)[None]
            inputs = unit(q) * logit_scale[:, None, None], unit(k), v.to(wide_type(v.dtype))
            if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, bias)):
                with sdpa_kernel(SDPBackend.MATH):
                    out = F.scaled_dot_product_attention(*inputs, attn_mask=bias, scale=1.0)
            else:
                out = F.scaled_dot_product_attention(*inputs, attn_mask=bias, scale=1.0)
            pieces.append(_from_heads(out.to(v.dtype), qkv))
        return to_map(torch.cat(pieces, 1), tiles)


def unit(x: Tensor) -> Tensor:
    """Scale vectors along the last axis to length one, in float32 or float64; zero stays zero, without a gradient.

    An epsilon added to the norm would underflow in half precision, and 0/0 is what an all-zero token gives there.
    """
    x = x.to(wide_type(x.dtype))
    # First to a length near one, by a power of two (exact, and a constant for the gradient): the square of a tiny
    # vector would underflow, and its reciprocal's gradient overflow.
    exponent = torch.frexp(x.detach().abs().amax(-1, keepdim=True)).exponent.clamp(-100, 100)
    x = x * torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), -exponent)
    square = x.square().sum(-1, keepdim=True)
    is_zero = square == 0
    return x * torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).rsqrt())


def _tile_attention(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor) -> Tensor:
    """q (T, N, r, D), k and v (T, N, n, D), bias (N, r, n) -> (T, N, r, D) in v's type."""
    scores = unit(q) @ unit(k).transpose(-2, -1) * logit_scale[:, None, None] + bias
    return (scores.softmax(-1) @ v.to(scores.dtype)).to(v.dtype)


def _groups(ordered: Tensor, tiles: Tiling) -> Iterator[tuple[TileGroup, tuple[Tensor, Tensor, Tensor]]]:
    """Cut (B, L, 3, N, D) in tile order into groups: q, k, v as (B * num_tiles, N, n, D)."""
    batch, _, _, heads, dim = ordered.shape
    start = 0
    for group in tiles.groups:
        length = group.num_tiles * group.num_tokens
        part = ordered.narrow(1, start, length).reshape(batch * group.num_tiles, group.num_tokens, 3, heads, dim)
        q, k, v = part.permute(2, 0, 3, 1, 4)
        yield group, (q, k, v)
        start += length


def _from_heads(x: Tensor, like: Tensor) -> Tensor:
    """(B * num_tiles, N, n, D) -> (B, num_tiles * n, N, D)."""
    return x.transpose(1, 2).reshape(like.shape[0], -1, x.shape[1], x.shape[3])


class _Sequential(torch.autograd.Function):
    """One group of tiles, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, table: Tensor, shape: Size, max_bytes: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, logit_scale, table)
        ctx.shape, ctx.max_bytes = shape, max_bytes
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for heads, rows, queries, tile_slices in _pieces(q, shape, max_bytes):
            bias = tile_bias(table[heads], shape, rows)
            for t in tile_slices:
                out[t, heads, queries] = _tile_attention(
                    q[t, heads, queries], k[t, heads], v[t, heads], logit_scale[heads], bias
                )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, logit_scale, table = ctx.saved_tensors
        wide = wide_type(q.dtype)
        dq = torch.empty_like(q)
        # Keys and values collect from several row pieces: summed in float32, rounded once.
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dscale, dtable = torch.zeros_like(logit_scale), torch.zeros_like(table)
        for heads, rows, queries, tile_slices in _pieces(q, ctx.shape, ctx.max_bytes):
            with torch.enable_grad():
                part = table[heads].detach().requires_grad_()
                expanded = tile_bias(part, ctx.shape, rows)
            bias = expanded.detach().requires_grad_()
            dbias = torch.zeros_like(bias)
            for t in tile_slices:
                inputs = (q[t, heads, queries], k[t, heads], v[t, heads])
                lq, lk, lv = (x.detach().to(wide).requires_grad_() for x in inputs)
                scale = logit_scale[heads].detach().requires_grad_()
                with torch.enable_grad():
                    piece = _tile_attention(lq, lk, lv, scale, bias)
                gq, gk, gv, gscale, gbias = torch.autograd.grad(
                    piece, (lq, lk, lv, scale, bias), grads[0][t, heads, queries].to(wide)
                )
                dq[t, heads, queries] = gq
                dk[t, heads] += gk
                dv[t, heads] += gv
                dscale[heads] += gscale
                dbias += gbias
            dtable[heads] += torch.autograd.grad(expanded, part, dbias)[0]
        return dq, dk.to(k.dtype), dv.to(v.dtype), dscale, dtable, None, None


def _pieces(q: Tensor, shape: Size, max_bytes: int) -> Iterator[tuple[slice, slice, slice, list[slice]]]:
    """(heads, rows of the first axis, queries of those rows, slices over tiles), each piece within ``max_bytes``."""
    num_tiles, num_heads = q.shape[0], q.shape[1]
    width = math.prod(shape[1:])
    one_row = width * math.prod(shape) * wide_type(q.dtype).itemsize  # scores of one row of one head of one tile
    # Of one piece live the scores and the bias: as many bytes again for every head and row.
    heads = max(1, min(num_heads, max_bytes // (2 * one_row * shape[0])))
    rows = shape[0] if 2 * one_row * shape[0] <= max_bytes else max(1, max_bytes // (2 * one_row))
    tiles = max(1, min(num_tiles, max_bytes // (one_row * rows * heads) - 1))
    tile_slices = [slice(t, min(t + tiles, num_tiles)) for t in range(0, num_tiles, tiles)]
    for head in range(0, num_heads, heads):
        for row in range(0, shape[0], rows):
            last = min(row + rows, shape[0])
            yield slice(head, head + heads), slice(row, last), slice(row * width, last * width), tile_slices
