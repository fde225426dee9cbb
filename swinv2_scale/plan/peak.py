"""The most memory that activations take at once, while forward and backward of one micro-batch go on.

Backward frees what forward kept, block by block from the last one, and needs room beside it: what a checkpointed block
recomputes, and the gradients of the operation that it is at. The largest such operation of a block is in its MLP or in
its attention. What follows is an account of both, read off torch's order of work; the test compares it with the
storages that are alive while torch works (on the meta device at any size), within 15 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import SimMIMConfig
from swinv2_scale.plan.activations import (
    KERNELS,
    DeviceType,
    Tiles,
    Widths,
    attention_bytes,
    block_bytes,
    decoded_pixels,
    kept_by_block,
    mlp_bytes,
    piece_of_sequential,
    score_bytes,
    tile_shapes,
    widths,
)

_WIDE = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of one process and one micro-batch.

    Attributes:
        kept: from forward to backward.
        peak: the most at once, ``kept`` included as far as it is still there then.
        largest_scores: the largest tensor of attention: the scores that one block holds at once.
        host: kept in host memory by offloading checkpoints.
    """

    kept: int
    peak: int
    largest_scores: int
    host: int = 0


def activations(config: RunConfig, device: DeviceType = "cuda") -> Activations:
    """Of the configured model, micro-batch, precision, attention and activation checkpointing."""
    model, batch = config.model, config.data.micro_batch_size
    checkpointing = config.engine.activation_checkpointing
    width = widths(config.engine.precision, device)
    kept = kept_by_block(config, device)
    peak, largest, host = kept[-1] + _loss_gradients(config, width), 0, 0
    blocks = [(stage, block) for stage, depth in enumerate(model.depths) for block in range(depth)]
    for (stage, block), until_here in zip(blocks, kept[1:], strict=False):
        recomputed = 0
        tokens = batch * math.prod(model.stage_maps[stage]) * model.stage_dims[stage] * width.residual
        if checkpointing.backend != "none":
            recomputed = block_bytes(model, stage, block, batch, width)
            host += tokens * checkpointing.offload
        beside = max(
            _mlp_gradients(model, stage, batch, width), _attention_gradients(model, stage, block, batch, width)
        )
        peak = max(peak, until_here + recomputed + beside)
        largest = max(largest, *(score_bytes(model, stage, tiles, batch) for tiles in tile_shapes(model, stage, block)))
    return Activations(kept[-1], peak, largest, host)


def _loss_gradients(config: RunConfig, width: Widths) -> int:
    """Gradients of the prediction where the loss is, or further down of a class head's weights."""
    model, batch = config.model, config.data.micro_batch_size
    if isinstance(config.task, SimMIMConfig):
        return 3 * batch * decoded_pixels(model, config.task) * model.in_channels * _WIDE
    weights = model.num_classes * model.stage_dims[-1] * (width.linear if not width.weight_copy else _WIDE)
    return max(weights - batch * model.num_classes * _WIDE, 3 * batch * model.num_classes * _WIDE)


def _mlp_gradients(model: ModelConfig, stage: int, batch: int, width: Widths) -> int:
    """GELU, made again, and its gradient stand beside everything that the block has saved; so does the gradient of one
    weight."""
    dim, hidden = model.stage_dims[stage], int(model.stage_dims[stage] * model.mlp_ratio)
    length = batch * math.prod(model.stage_maps[stage])
    rounded = hidden * dim * width.weight_copy  # of fc2, made again too
    return length * (2 * hidden * width.linear + dim * width.residual) + rounded + _weight_gradient(model, stage, width)


def _attention_gradients(model: ModelConfig, stage: int, block: int, batch: int, width: Widths) -> int:
    """What attention needs, less what is free by then: the MLP's part, and smaller tiles, which come first."""
    saved = attention_bytes(model, stage, block, batch, width)
    largest = next(iter(saved))
    free = mlp_bytes(model, stage, batch, width)
    if model.stage_backends[stage] in KERNELS:  # gradients of the output, and of queries, keys and values
        needed = 4 * batch * math.prod(model.stage_maps[stage]) * model.stage_dims[stage] * width.linear
    elif model.stage_backends[stage] == "sequential":
        needed = _one_piece(model, stage, largest, batch, width)
        free += (
            batch * math.prod(model.stage_maps[stage]) * model.stage_dims[stage] * width.norm
        )  # the first norm's input
    else:
        free += sum(saved.values()) - saved[largest]
        scores = score_bytes(model, stage, largest, batch)
        needed = 2 * scores + scores // (batch * largest.count)  # before and behind the softmax, and of the bias
    return needed - free + _weight_gradient(model, stage, width)


def _one_piece(model: ModelConfig, stage: int, tiles: Tiles, batch: int, width: Widths) -> int:
    """``sequential`` recomputes and differentiates one piece at a time, beside the gradients of q, k and v."""
    heads, dim = model.num_heads[stage], model.stage_dims[stage]
    rows = batch * tiles.count * tiles.tokens * heads
    piece, bias = piece_of_sequential(model, stage, tiles, batch)
    # Of a piece: unit vectors, what products read, their gradients, and float32 copies where they are narrower.
    copies = 10 if width.linear < _WIDE else 7
    vectors = rows * dim // heads * _WIDE
    gradients = 3 * vectors
    return 4 * piece + 3 * bias + gradients + copies * vectors * piece // (rows * tiles.tokens * _WIDE)


def _weight_gradient(model: ModelConfig, stage: int, width: Widths) -> int:
    """Of the largest Linear of a block, before it is added to where gradients are gathered."""
    dim = model.stage_dims[stage]
    return max(3 * dim, int(dim * model.mlp_ratio)) * dim * (width.linear if not width.weight_copy else _WIDE)
