"""Parameters and multiply-adds of a model, counted from its configuration."""

from __future__ import annotations

import math

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.geometry import Size, effective_shift, spans
from swinv2_scale.plan.parameters import backbone_parameters


def num_parameters(model: ModelConfig) -> int:
    """Trainable numbers of the backbone, and of the classification head where ``num_classes`` isn't 0.

    What a task adds (SimMIM's mask token and pixel head) is in plan/parameters.py.
    """
    return sum(math.prod(shape) for _, shape in backbone_parameters(model))


def num_multiply_adds(model: ModelConfig, *, as_published: bool = True) -> int:
    """Multiply-adds of one image at the model's own ``image_size`` and window: what papers and READMEs call FLOPs.

    Counted as in Microsoft's released code (``flops()`` in models/swin_transformer_v2.py): patch embedding, qkv,
    q @ k, attention @ v, projection, MLP, merging, head, and one for every number that a LayerNorm makes. Left out, as
    there: additions of biases and residuals, the softmax, the cosine's norms, and the MLP of the position bias, which
    runs once a block whatever the batch (60 M for T with a window of 16, 0.9 % of the forward of one 256 px image).

    Two things differ from that code. It refuses a map that its window doesn't divide, others pad it to whole windows;
    here it has smaller tiles at its border: SwinV2-G at 1536 px with a window of 32 is 25,572 G, with padding 26,137 G.
    And the last norm is counted for the tokens of the last map, a quarter of the released formula's (below 0.01 %).

    Args:
        as_published: True counts every block like one that isn't shifted: the released code computes whole windows
            in shifted blocks too, and masks. False counts the tiles that a shift cuts as small as they are: what this
            package really multiplies.
    """
    tokens = [math.prod(size) for size in model.stage_maps]
    total = tokens[0] * model.embed_dim * (model.patch_size**2 * model.in_channels + 1)
    for stage, dim in enumerate(model.stage_dims):
        for block in range(model.depths[stage]):
            shifted = block % 2 == 1 and not as_published
            pairs = attention_pairs(model.stage_maps[stage], model.window_shape, shifted)
            linears = 4 * dim + 2 * _hidden(model, dim)  # qkv and projection, both Linears of the MLP
            total += tokens[stage] * dim * (linears + _num_norms(model, stage, block)) + 2 * pairs * dim
        if stage + 1 < model.num_stages:
            total += tokens[stage + 1] * 2 * dim * (4 * dim + 1)
    return total + model.stage_dims[-1] * (tokens[-1] + model.num_classes)


def attention_pairs(map_size: Size, window_size: Size, shifted: bool) -> int:
    """Pairs of a query and a key that one block looks at, for one head of one image.

    Args:
        map_size: tokens along each axis.
        window_size: the configured window; clipped to the map.
        shifted: True for every second block of a stage.
    """
    shift = effective_shift(window_size, map_size) if shifted else (0,) * len(map_size)
    # Tiles are products of spans, so the sum of their squared areas is a product of sums.
    axes = zip(map_size, window_size, shift, strict=True)
    return math.prod(sum(size**2 for _, size in spans(*axis)) for axis in axes)


def _num_norms(model: ModelConfig, stage: int, block: int) -> int:
    return 2 + model.has_extra_norm(stage, block)


def _hidden(model: ModelConfig, dim: int) -> int:
    return int(dim * model.mlp_ratio)
