"""What a file of weights says beside its tensors, and what its tensors' shapes say about the model.

Each format keeps another part: Hugging Face a configuration, Microsoft and torchvision tables that windows can be read
from, timm nothing but the model's name in the hub's config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.errors import WeightsError

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its weights; what isn't known is absent."""

    #: Fields of ModelConfig.
    model: dict[str, Any] = field(default_factory=dict)
    #: How its images are normalised, and the names of its classes.
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None

    def normalisation(self, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of pixels: as said, else ImageNet's for three channels, else a half."""
        default = _IMAGENET if in_channels == 3 else ((0.5,) * in_channels,) * 2
        return self.pixel_mean or default[0], self.pixel_std or default[1]


def shape_fields(shapes: Mapping[str, Sequence[int]], depths: Sequence[int]) -> dict[str, Any]:
    """The fields of ModelConfig that tensors' shapes fix, from whole and consistent ones."""
    dim, in_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    hidden = shapes["layers.0.blocks.0.mlp.fc1.weight"][0]
    # The model takes int(dim * ratio): a quotient rounded down would lose one.
    mlp_ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else math.nextafter(hidden / dim, math.inf)
    fields: dict[str, Any] = {
        "embed_dim": dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "depths": tuple(depths),
        "num_heads": tuple(shapes[f"layers.{i}.blocks.0.attn.logit_scale"][0] for i in range(len(depths))),
        "mlp_ratio": mlp_ratio,
        "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        **_extra_norm_fields(shapes, depths),
    }
    compared = ("embed_dim", "depths")
    same = [name for name, variant in VARIANTS.items() if all(variant[key] == fields[key] for key in compared)]
    return {"variant": same[0] if same else "tiny", **fields}


def native_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """A ModelConfig from JSON: lists become tuples again."""
    return {key: as_tuples(value) for key, value in model.items()}


def microsoft_facts(raw: Mapping[str, Tensor], config: Any, patch_size: int, depths: Sequence[int]) -> Facts:
    """From the configuration that its trainer saves, else from the tables that its model keeps."""
    try:
        swin = config["MODEL"]["SWINV2"]
        fields = {"image_size": as_tuples(config["DATA"]["IMG_SIZE"]), "window_size": as_tuples(swin["WINDOW_SIZE"])}
        windows = tuple(as_tuples(size) for size in swin["PRETRAINED_WINDOW_SIZES"])
        return Facts(fields | ({"pretrained_window_sizes": windows} if any(windows) else {}))
    except (KeyError, TypeError):
        return Facts(_microsoft_tables(raw, patch_size, depths))


def torchvision_facts(raw: Mapping[str, Tensor], depths: Sequence[int]) -> Facts:
    """From the tables of offsets; the image size is nowhere."""
    return Facts(_table_fields(raw, [f"features.{2 * stage + 1}.0.attn." for stage in range(len(depths))]))


def _microsoft_tables(raw: Mapping[str, Tensor], patch_size: int, depths: Sequence[int]) -> dict[str, Any]:
    fields = _table_fields(raw, [f"layers.{stage}.blocks.0.attn." for stage in range(len(depths))])
    if fields and depths[0] > 1:
        # One mask a window; none where the first map is a single window.
        mask = raw.get("layers.0.blocks.1.attn_mask")
        fields["image_size"] = (math.isqrt(len(mask)) if mask is not None else 1) * fields["window_size"] * patch_size
    return fields


def _table_fields(raw: Mapping[str, Tensor], stages: Sequence[str]) -> dict[str, Any]:
    """Window and pretrained windows, from the table of offsets that the first block of each stage keeps."""
    windows, pretrained = [], []
    for prefix in stages:
        table = raw.get(f"{prefix}relative_coords_table")
        if table is None:
            return {}
        window = (table.shape[1] + 1) // 2
        windows.append(window)
        # Offsets run to log2(8 * (window - 1) / (pretrained - 1) + 1) / 3.
        largest = (2 ** (3 * float(table.max())) - 1) / 8
        pretrained.append(round((window - 1) / largest) + 1 if window > 1 and largest > 0 else 1)
    return {"window_size": max(windows), "pretrained_window_sizes": tuple(pretrained)}


def timm_fields(architecture: str) -> dict[str, Any]:
    """From a timm name like ``swinv2_base_window12to24_192to384``; the released ...to... models began at 192/12."""
    match = re.search(r"^swinv2_\w*?window(\d+)(to(\d+))?_(\d+)(to(\d+))?", architecture)
    if not match:
        return {}
    fields: dict[str, Any] = {"window_size": int(match[3] or match[1]), "image_size": int(match[6] or match[4])}
    first = ModelConfig.model_validate({"image_size": int(match[4]), "window_size": int(match[1])}).settled
    return fields | {"pretrained_window_sizes": first.pretrained_window_sizes}


def _extra_norm_fields(shapes: Mapping[str, Sequence[int]], depths: Sequence[int]) -> dict[str, Any]:
    """Every how many blocks there is a norm on the main branch."""
    places = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
    found = [place for place in places if f"layers.{place[0]}.blocks.{place[1]}.norm3.weight" in shapes]
    if not found:
        return {"extra_norm_every": 0}
    for counter in ("stage", "model"):
        for every in range(1, sum(depths) + 1):
            shape = {"depths": tuple(depths), "extra_norm_every": every, "extra_norm_counter": counter}
            config = ModelConfig.model_validate(shape)
            if [place for place in places if config.has_extra_norm(*place)] == found:
                return {"extra_norm_every": every, "extra_norm_counter": counter}
    raise WeightsError(f"norms on the main branch (norm3) stand after blocks {found}, which no regular counting gives")


def as_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that configurations are made of."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list | tuple) else value
