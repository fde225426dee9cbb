"""Every parameter of a run's model by name, from the configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.run import RunConfig

Shape = tuple[int, ...]
Named = tuple[str, Shape]

#: Hidden width of the MLP that makes a position bias, in every variant.
BIAS_MLP_WIDTH = 512
#: The backbone inside a task's model.
_ENCODER = "encoder."
_BLOCK, _MERGING = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\."), re.compile(r"layers\.(\d+)\.downsample\.")
#: Parts of names that are never decayed, beside biases and vectors. Source: the released code's keyword lists.
_NO_DECAY = ("cpb_mlp", "logit_scale", "mask_token")


def run_parameters(config: RunConfig) -> dict[str, Shape]:
    """Name and shape of every parameter that is trained: the backbone's with its class head, or SimMIM's mask token
    and its pixel head beside it."""
    model = config.model
    pixels = model.stride**2 * model.in_channels
    backbone = {_ENCODER + name: shape for name, shape in backbone_parameters(model)}
    if config.task.name != "simmim":
        return backbone
    head = _with_bias("decoder.0", (pixels, model.stage_dims[-1], 1, 1))
    return {"mask_token": (1, 1, model.embed_dim), **backbone, **dict(head)}


def backbone_parameters(model: ModelConfig) -> Iterator[Named]:
    """(name, shape) of the backbone's parameters, and of the classification head where ``num_classes`` isn't 0."""
    first, last = model.embed_dim, model.stage_dims[-1]
    yield from _with_bias("patch_embed.proj", (first, model.in_channels, model.patch_size, model.patch_size))
    yield from _norm("patch_embed.norm", first)
    for stage, dim in enumerate(model.stage_dims):
        for block in range(model.depths[stage]):
            yield from _block(f"layers.{stage}.blocks.{block}.", model, stage, block)
        if stage + 1 < model.num_stages:
            yield f"layers.{stage}.downsample.reduction.weight", (2 * dim, 4 * dim)
            yield from _norm(f"layers.{stage}.downsample.norm", 2 * dim)
    yield from _norm("norm", last)
    if model.num_classes:
        yield from _with_bias("head", (model.num_classes, last))


def is_decayed(name: str, shape: Shape) -> bool:
    """Whether weight decay applies: not to vectors, biases, the bias MLP, logit scales and the mask token."""
    return len(shape) > 1 and not name.endswith("bias") and not any(part in name for part in _NO_DECAY)


@dataclass(frozen=True)
class ParameterGroup:
    """What the optimizer treats alike; ZeRO cuts each group by itself.

    Attributes:
        layers_above: between these parameters and the head; 0 where layers aren't told apart.
    """

    names: tuple[str, ...]
    is_decayed: bool
    layers_above: int


def parameter_groups(shapes: Mapping[str, Shape], by_layer: bool) -> list[ParameterGroup]:
    """The optimizer's groups, in its order: the decayed parameters and the others, of each layer where asked."""
    layers = layer_numbers(shapes)
    last = max(layers.values())
    groups: dict[tuple[int, bool], list[str]] = {(0, True): [], (0, False): []} if not by_layer else {}
    for name, shape in shapes.items():
        above = last - layers[name] if by_layer else 0
        groups.setdefault((above, is_decayed(name, shape)), []).append(name)
    return [ParameterGroup(tuple(names), decayed, above) for (above, decayed), names in groups.items()]


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """The layer of every parameter of a model, as layer-wise learning rates count them.

    0 are the patch embedding and the mask token; block k, counted from 0 through the model, is k + 1; a merging belongs
    to the block before it; the last norm and the heads come last.
    Source: the released code (``get_swin_layer`` in its optimizer).
    """
    names = list(names)
    blocks = {(int(match[1]), int(match[2])) for name in names if (match := _BLOCK.search(name))}
    numbers = {block: number for number, block in enumerate(sorted(blocks), 1)}
    found = {}
    for name in names:
        if match := _BLOCK.search(name):
            found[name] = numbers[int(match[1]), int(match[2])]
        elif match := _MERGING.search(name):
            found[name] = max(number for (stage, _), number in numbers.items() if stage == int(match[1]))
        else:
            found[name] = 0 if "patch_embed" in name or "mask_token" in name else len(blocks) + 1
    return found


def _block(prefix: str, model: ModelConfig, stage: int, block: int) -> Iterator[Named]:
    dim, num_heads = model.stage_dims[stage], model.num_heads[stage]
    hidden = int(dim * model.mlp_ratio)
    attention = prefix + "attn."
    yield attention + "logit_scale", (num_heads, 1, 1)  # one temperature a head
    yield attention + "q_bias", (dim,)  # keys have no bias
    yield attention + "v_bias", (dim,)
    yield from _with_bias(attention + "cpb_mlp.0", (BIAS_MLP_WIDTH, len(model.window_shape)))
    yield attention + "cpb_mlp.2.weight", (num_heads, BIAS_MLP_WIDTH)
    yield attention + "qkv.weight", (3 * dim, dim)
    yield from _with_bias(attention + "proj", (dim, dim))
    yield from _norm(prefix + "norm1", dim)
    yield from _with_bias(prefix + "mlp.fc1", (hidden, dim))
    yield from _with_bias(prefix + "mlp.fc2", (dim, hidden))
    yield from _norm(prefix + "norm2", dim)
    if model.has_extra_norm(stage, block):
        yield from _norm(prefix + "norm3", dim)


def _with_bias(name: str, weight: Shape) -> Iterator[Named]:
    yield name + ".weight", weight
    yield name + ".bias", weight[:1]


def _norm(name: str, dim: int) -> Iterator[Named]:
    return _with_bias(name, (dim,))
