"""What each format calls the weights of a Swin V2.

Our names are Microsoft's, without the prefix ``encoder.`` that pre-training models put before the backbone's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["native", "microsoft", "hf", "timm", "torchvision"]
FORMATS: tuple[Format, ...] = ("native", "microsoft", "hf", "timm", "torchvision")
#: In sentences.
FORMAT_NAMES: dict[Format, str] = {
    "native": "swinv2_scale",
    "microsoft": "Microsoft",
    "hf": "Hugging Face",
    "timm": "timm",
    "torchvision": "torchvision",
}

#: ours | Hugging Face | timm | torchvision; ``*`` is weight and bias, None: the format has no such weight.
#: i, j: stage and block; next = i + 1; torchvision numbers blocks = 2i + 1 and merge = 2i + 2 in one list.
_OURS = "layers.{i}.blocks.{j}."
_HF, _HF_ATTENTION = "swinv2.encoder.layers.{i}.blocks.{j}.", "swinv2.encoder.layers.{i}.blocks.{j}.attention."
_TV = "features.{blocks}.{j}."
_ONCE: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("patch_embed.proj.*", "swinv2.embeddings.patch_embeddings.projection.*", "patch_embed.proj.*", "features.0.0.*"),
    ("patch_embed.norm.*", "swinv2.embeddings.norm.*", "patch_embed.norm.*", "features.0.2.*"),
    ("norm.*", "swinv2.layernorm.*", "norm.*", "norm.*"),
    ("head.*", "classifier.*", "head.fc.*", "head.*"),
    ("mask_token", "swinv2.embeddings.mask_token", None, None),
    ("decoder.0.*", "decoder.0.*", None, None),
)
_EACH_BLOCK = (
    (_OURS + "norm1.*", _HF + "layernorm_before.*", _OURS + "norm1.*", _TV + "norm1.*"),
    (_OURS + "norm2.*", _HF + "layernorm_after.*", _OURS + "norm2.*", _TV + "norm2.*"),
    (_OURS + "norm3.*", None, None, None),
    (
        _OURS + "attn.logit_scale",
        _HF_ATTENTION + "self.logit_scale",
        _OURS + "attn.logit_scale",
        _TV + "attn.logit_scale",
    ),
    (
        _OURS + "attn.cpb_mlp.0.*",
        _HF_ATTENTION + "self.continuous_position_bias_mlp.0.*",
        _OURS + "attn.cpb_mlp.0.*",
        _TV + "attn.cpb_mlp.0.*",
    ),
    (
        _OURS + "attn.cpb_mlp.2.weight",
        _HF_ATTENTION + "self.continuous_position_bias_mlp.2.weight",
        _OURS + "attn.cpb_mlp.2.weight",
        _TV + "attn.cpb_mlp.2.weight",
    ),
    (_OURS + "attn.proj.*", _HF_ATTENTION + "output.dense.*", _OURS + "attn.proj.*", _TV + "attn.proj.*"),
    (_OURS + "mlp.fc1.*", _HF + "intermediate.dense.*", _OURS + "mlp.fc1.*", _TV + "mlp.0.*"),
    (_OURS + "mlp.fc2.*", _HF + "output.dense.*", _OURS + "mlp.fc2.*", _TV + "mlp.3.*"),
)
_EACH_MERGING = tuple(
    (
        "layers.{i}.downsample." + leaf,
        "swinv2.encoder.layers.{i}.downsample." + leaf,
        "layers.{next}.downsample." + leaf,
        "features.{merge}." + leaf,
    )
    for leaf in ("reduction.weight", "norm.*")
)
_COLUMN: dict[Format, int] = {"native": 0, "microsoft": 0, "hf": 1, "timm": 2, "torchvision": 3}

#: What is no weight: the formats keep such tensors or not, and all compute them anew.
_BUFFERS = re.compile(r"(^|\.)(relative_coords_table|relative_position_index|attn_mask|k_bias)$")
#: A name only this format has, to tell it by, and what its blocks' names begin with.
_LANDMARKS: dict[Format, str] = {
    "hf": "swinv2.embeddings.patch_embeddings.projection.weight",
    "torchvision": "features.0.0.weight",
    "timm": "head.fc.weight",
    "microsoft": "patch_embed.proj.weight",
}
_WRAPPERS, _PATCH = ("_orig_mod.", "module.", "model.", "backbone.", "encoder."), "patch_embed"
_BLOCK: dict[Format, str] = {
    "hf": r"swinv2\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.",
    "torchvision": r"features\.(\d+)\.(\d+)\.attn\.",
}
_BLOCK_ELSEWHERE = r"layers\.(\d+)\.blocks\.(\d+)\."


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, and what they are in another format."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]  # empty: the format has no place for them
    pack: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda ours: ours
    unpack: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda theirs: theirs


def rules(style: Format, depths: Sequence[int]) -> list[Rule]:
    """How a format keeps every weight that a model of these depths can have, in the model's order."""
    found = [rule for row in _ONCE[:2] for rule in _rows(row, style)]
    for i, depth in enumerate(depths):
        place = {"i": i, "next": i + 1, "blocks": 2 * i + 1, "merge": 2 * i + 2}
        for j in range(depth):
            found += _qkv(style, place | {"j": j})
            found += [rule for row in _EACH_BLOCK for rule in _rows(row, style, place | {"j": j})]
        if i + 1 < len(depths):
            found += [rule for row in _EACH_MERGING for rule in _rows(row, style, place)]
    return found + [rule for row in _ONCE[2:] for rule in _rows(row, style)]


def normalise(names: Iterable[str]) -> dict[str, str]:
    """Each name of a file -> the same without wrappers' prefixes, and with today's word for the bias MLP."""
    names = list(names)
    renamed = dict(zip(names, names, strict=True))
    # SimMIM's encoder stands beside its decoder, so not every name has the prefix; wrappers can stand inside wrappers.
    while wrapper := next((w for w in _WRAPPERS if any(n.startswith(w) and _PATCH in n for n in renamed.values())), ""):
        renamed = {name: new.removeprefix(wrapper) for name, new in renamed.items()}
    if "embeddings.patch_embeddings.projection.weight" in renamed.values():  # a bare Swinv2Model
        renamed = {
            name: new if new.startswith(("classifier.", "decoder.")) else f"swinv2.{new}"
            for name, new in renamed.items()
        }
    return {name: new.replace(".rpe_mlp.", ".cpb_mlp.") for name, new in renamed.items()}


def detect(names: Iterable[str]) -> Format | None:
    """The format that normalised names are in; None where they are no Swin V2's.

    timm and Microsoft differ in the merging's place and the head's name alone.
    """
    present = set(names)
    if not any(name.endswith(".logit_scale") for name in present) or any("meta_mlp" in name for name in present):
        return None  # timm's swinv2_cr has the names of a Swin V2, and other bias MLPs
    for style in ("hf", "torchvision", "timm"):
        if _LANDMARKS[style] in present:
            return style
    if _LANDMARKS["microsoft"] not in present:
        return None
    first = "layers.0.downsample.reduction.weight"
    return "timm" if first not in present and "layers.1.downsample.reduction.weight" in present else "microsoft"


def depths_of(names: Iterable[str], style: Format) -> tuple[int, ...]:
    """Blocks of each stage, counted in normalised names."""
    last: dict[int, int] = {}
    for name in names:
        match = re.match(_BLOCK.get(style, _BLOCK_ELSEWHERE), name)
        if match:
            stage = int(match[1]) // 2 if style == "torchvision" else int(match[1])
            last[stage] = max(last.get(stage, 0), int(match[2]) + 1)
    return tuple(last.get(stage, 0) for stage in range(max(last, default=-1) + 1))


def is_buffer(name: str) -> bool:
    """Whether a name is of a tensor that every format computes anew."""
    return _BUFFERS.search(name) is not None


def seems_to_be(names: Iterable[str]) -> str:
    """A guess at what a file that isn't a Swin V2 holds."""
    present = set(names)

    def any_has(*parts: str) -> bool:
        return any(part in name for name in present for part in parts)

    if any_has("relative_position_bias_table"):
        return "a Swin V1 (it has relative_position_bias_table)"
    if any_has("attn.meta_mlp"):
        return "timm's swinv2_cr, which is another architecture (its bias MLP and its order of norms differ)"
    if any_has(".attn.w_msa."):
        return "a Swin V2 of OpenMMLab, whose names are not read; convert it with its own tools first"
    if any_has("cls_token", "pos_embed", "class_token"):
        return "a Vision Transformer"
    if any_has("layer1.0.conv1", "bn1.running_mean"):
        return "a convolutional network"
    if any_has("logit_scale"):
        return "a part of a Swin V2, or one whose names were changed"
    return "no Swin Transformer"


def _rows(row: tuple[str | None, ...], style: Format, place: Mapping[str, int] | None = None) -> list[Rule]:
    ours, theirs = row[0], row[_COLUMN[style]]
    assert ours is not None
    leaves = ("weight", "bias") if ours.endswith("*") else ("",)

    def fill(pattern: str, leaf: str) -> str:
        return pattern.format(**(place or {})).replace("*", leaf)

    return [Rule((fill(ours, leaf),), () if theirs is None else (fill(theirs, leaf),)) for leaf in leaves]


def _qkv(style: Format, place: Mapping[str, int]) -> list[Rule]:
    """The one place where formats cut tensors differently; keys have no bias anywhere."""
    ours = _OURS.format(**place) + "attn."
    weight, biases = (ours + "qkv.weight",), (ours + "q_bias", ours + "v_bias")
    if style == "hf":
        theirs = _HF_ATTENTION.format(**place) + "self."
        parts = tuple(f"{theirs}{part}.weight" for part in ("query", "key", "value"))
        return [
            Rule(weight, parts, pack=lambda x: x[0].chunk(3), unpack=lambda x: [torch.cat(list(x))]),
            Rule(biases, (f"{theirs}query.bias", f"{theirs}value.bias")),
        ]
    if style == "torchvision":
        theirs = _TV.format(**place) + "attn.qkv."
        return [
            Rule(weight, (f"{theirs}weight",)),
            Rule(
                biases,
                (f"{theirs}bias",),
                pack=lambda x: [torch.cat((x[0], torch.zeros_like(x[0]), x[1]))],
                unpack=lambda x: x[0].chunk(3)[::2],
            ),
        ]
    return [Rule(weight, weight), Rule(biases, biases)]
