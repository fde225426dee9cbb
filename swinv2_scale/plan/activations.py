"""What a forward pass keeps for the backward pass, tensor by tensor.

Written down from models/block.py, backbone.py, position_bias.py, ops/torch_attention.py and tasks/: what
autograd saves of each of their operations. tests/unit/plan/test_activations.py compares it with what torch really
keeps. Letters: B images, L tokens of a map, C width, N heads, D head_dim, n tokens of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import ClassificationConfig, SimMIMConfig, num_hidden
from swinv2_scale.geometry import Size, effective_shift, spans

DeviceType = Literal["cuda", "cpu"]
_WIDE = 4  # bytes of float32, which attention, the position bias and the loss are in
_BIT16 = 2
#: Backends that keep qkv as it came and the logarithms of sums; the output is the projection's input.
KERNELS = ("fused", "triton")


@dataclass(frozen=True)
class Tiles:
    """All tiles of one shape, in one image."""

    shape: Size
    count: int

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Widths:
    """Bytes of one number, by what it is.

    Attributes:
        linear: what Linears read and write.
        residual: tokens between blocks.
        norm: what LayerNorms read.
        weight_copy: of a weight that autocast has rounded, and keeps; 0 without autocast.
    """

    linear: int
    residual: int
    norm: int
    weight_copy: int = 0


def widths(precision: str, device: DeviceType = "cuda") -> Widths:
    """What ``engine.precision`` means for activations.

    Autocast runs LayerNorm in float32 on CUDA and in bfloat16 on CPUs (torch's documentation, "CUDA Ops that can
    autocast to float32"), and what it returns is what blocks add up.
    """
    if precision == "fp32":
        return Widths(_WIDE, _WIDE, _WIDE)
    if precision == "bf16":
        return Widths(_BIT16, _BIT16, _BIT16)
    wide = _WIDE if device == "cuda" else _BIT16
    return Widths(_BIT16, wide, wide, weight_copy=_BIT16)


def kept_by_block(config: RunConfig, device: DeviceType = "cuda") -> list[int]:
    """What is kept from forward to backward, counted up: after the images and the patch embedding, then after each
    block (with the merging behind it, if there is one), then after the head and the loss.

    Of one process and one micro-batch. The last number is all of it, as long as it isn't kept in host memory.
    """
    model, batch = config.model, config.data.micro_batch_size
    checkpointing = config.engine.activation_checkpointing
    width = widths(config.engine.precision, device)
    kept = [_embedding_bytes(config, width)]
    for stage, map_size in enumerate(model.stage_maps):
        inputs = batch * math.prod(map_size) * model.stage_dims[stage] * width.residual
        for block in range(model.depths[stage]):
            if checkpointing.backend == "none":
                own = block_bytes(model, stage, block, batch, width)
            else:
                own = 0 if checkpointing.offload else inputs
            kept.append(kept[-1] + own)
        if stage + 1 < model.num_stages:
            kept[-1] += _merging_bytes(model, stage, batch, width)
    return [*kept, kept[-1] + _head_bytes(config, width)]


def block_bytes(model: ModelConfig, stage: int, block: int, batch: int, width: Widths) -> int:
    """What one block saves; its input counts as its own."""
    dim, hidden = model.stage_dims[stage], int(model.stage_dims[stage] * model.mlp_ratio)
    length = batch * math.prod(model.stage_maps[stage])
    attention_side = length * (2 * dim * width.linear + dim * width.norm + 2 * _WIDE)  # inputs: qkv, projection, norm
    if model.has_extra_norm(stage, block):
        attention_side += length * (dim * width.norm + 2 * _WIDE)
    weights = (4 * dim * dim + dim * hidden) * width.weight_copy  # fc2 rounds its own once more in backward
    attention = sum(attention_bytes(model, stage, block, batch, width).values())
    return attention_side + mlp_bytes(model, stage, batch, width) + weights + attention + _bias_bytes(model, stage)


def mlp_bytes(model: ModelConfig, stage: int, batch: int, width: Widths) -> int:
    """What the MLP of a block and the norm behind it save: inputs of fc1, GELU and the norm."""
    dim, hidden = model.stage_dims[stage], int(model.stage_dims[stage] * model.mlp_ratio)
    length = batch * math.prod(model.stage_maps[stage])
    return length * ((dim + hidden) * width.linear + dim * width.norm + 2 * _WIDE)


def attention_bytes(model: ModelConfig, stage: int, block: int, batch: int, width: Widths) -> dict[Tiles, int]:
    """What is saved between the qkv Linear and the projection, by shape of tile."""
    heads, dim = model.num_heads[stage], model.stage_dims[stage]
    backend, length = model.stage_backends[stage], math.prod(model.stage_maps[stage])
    found: dict[Tiles, int] = {}
    # Where the tiles of a shape lie in one piece, its q, k and v are views of the whole tensor in tile order.
    whole = 3 * batch * length * dim * width.linear
    for tiles in tile_shapes(model, stage, block):
        is_view = batch == 1 or tiles.count == 1 or tiles.tokens * tiles.count == length
        rows = batch * tiles.tokens * tiles.count * heads
        scores = rows * tiles.tokens * _WIDE
        vectors = rows * dim // heads * _WIDE
        # For queries and keys: the vectors, their power of two, their sum of squares' reciprocal root, where it is 0.
        unit = 2 * (vectors + rows * (3 * _WIDE + 1))
        if backend in KERNELS:
            found[tiles], whole = whole + rows * _WIDE, 0
        elif backend == "sequential":
            found[tiles], whole = (whole, 0) if is_view else (3 * rows * dim // heads * width.linear, whole)
        elif backend in ("eager", "auto"):  # q, k, v as matrix products read them; raw scores, softmax
            found[tiles] = unit + 3 * vectors + 2 * scores
        else:  # the same, unit queries before their scale; softmax
            found[tiles] = unit + 4 * vectors + scores
        if backend not in ("sequential", *KERNELS) and batch * tiles.count == 1 and width.linear == _WIDE:
            found[tiles] += whole - vectors  # v is read where it lies
            whole = 0
    return found


def score_bytes(model: ModelConfig, stage: int, tiles: Tiles, batch: int) -> int:
    """The scores that one block's attention holds at once of one shape of tile, float32."""
    if model.stage_backends[stage] in KERNELS:
        return 0
    if model.stage_backends[stage] == "sequential":
        return piece_of_sequential(model, stage, tiles, batch)[0]
    return batch * tiles.count * model.num_heads[stage] * tiles.tokens**2 * _WIDE


def piece_of_sequential(model: ModelConfig, stage: int, tiles: Tiles, batch: int) -> tuple[int, int]:
    """(scores, bias) of one piece of the work, in bytes; as ``_pieces`` of ops/torch_attention.py cuts it."""
    limit, first = model.attention.max_score_bytes, tiles.shape[0]
    one_row = tiles.tokens**2 // first * _WIDE
    heads = max(1, min(model.num_heads[stage], limit // (2 * one_row * first)))
    rows = first if 2 * one_row * first <= limit else max(1, limit // (2 * one_row))
    bias = one_row * rows * heads
    return bias * max(1, min(batch * tiles.count, limit // bias - 1)), bias


def tile_shapes(model: ModelConfig, stage: int, block: int) -> list[Tiles]:
    """Every shape of tile that a block has, largest first."""
    counts: dict[Size, int] = {(): 1}
    map_size = model.stage_maps[stage]
    shift = effective_shift(model.window_shape, map_size) if block % 2 else (0,) * len(map_size)
    for axis in zip(map_size, model.window_shape, shift, strict=True):
        lengths = [size for _, size in spans(*axis)]
        counts = {(*shape, n): times * lengths.count(n) for shape, times in counts.items() for n in set(lengths)}
    return [Tiles(shape, count) for shape, count in sorted(counts.items(), reverse=True)]


def _bias_bytes(model: ModelConfig, stage: int) -> int:
    """The table of the position bias: its sigmoid; the MLP's hidden layer is computed again."""
    heads = model.num_heads[stage]
    offsets = math.prod(2 * length - 1 for length in model.stage_windows[stage])
    # ``sequential`` and our kernels keep the finished table, ``eager`` and ``sdpa`` have expanded it.
    tables = 2 if model.stage_backends[stage] in ("sequential", *KERNELS) else 1
    return offsets * tables * heads * _WIDE


def _merging_bytes(model: ModelConfig, stage: int, batch: int, width: Widths) -> int:
    dim = model.stage_dims[stage]
    length = batch * math.prod(model.stage_maps[stage + 1])
    weights = 8 * dim * dim * width.weight_copy
    return length * (4 * dim * width.linear + 2 * dim * width.norm + 2 * _WIDE) + weights


def _embedding_bytes(config: RunConfig, width: Widths) -> int:
    """Images as they come and as the patch convolution reads them, its norm's input, where the mask token is."""
    model, batch = config.model, config.data.micro_batch_size
    values = batch * math.prod(model.image_shape) * model.in_channels
    stored = {"uint8": 1, "uint16": 2, "float32": 4}[config.data.pixel_type]
    tokens = batch * math.prod(model.stage_maps[0])
    weights = model.patch_size**2 * model.in_channels * model.embed_dim * width.weight_copy
    mask = tokens if config.task.name == "simmim" else 0
    return values * (stored + width.linear) + tokens * (model.embed_dim * width.norm + 2 * _WIDE) + mask + weights


def _head_bytes(config: RunConfig, width: Widths) -> int:
    """The last norm's input and the head's; for the loss of classes logarithms of shares and soft labels, of pixels the
    sign of each error, and where they count if it isn't hidden units alone that are decoded."""
    model, task, batch = config.model, config.task, config.data.micro_batch_size
    tokens, dim = batch * math.prod(model.stage_maps[-1]), model.stage_dims[-1]
    if isinstance(task, ClassificationConfig):
        weights = model.num_classes * dim * width.weight_copy
        norm = tokens * (dim * width.norm + 2 * _WIDE)
        return norm + batch * (dim * width.linear + 2 * model.num_classes * _WIDE) + weights
    weights = model.stride**2 * model.in_channels * dim * width.weight_copy
    pixels = decoded_pixels(model, task)
    tokens = batch * pixels // model.stride**2
    is_part = pixels < math.prod(model.image_shape)
    loss = batch * pixels * (model.in_channels + (not is_part)) * _WIDE
    return tokens * (dim * (width.norm + width.linear) + 2 * _WIDE) + loss + weights


def decoded_pixels(model: ModelConfig, task: SimMIMConfig) -> int:
    """Of an image: those of the hidden units, where no token of the last stage is partly hidden; else all."""
    unit = task.mask_patch_size
    if unit % model.stride:
        return math.prod(model.image_shape)
    return num_hidden(tuple(length // unit for length in model.image_shape), task.mask_ratio) * unit**2
