"""What a file of weights says beside its tensors, and what its tensors' shapes say about the model.

Each format keeps another part: Hugging Face a configuration, Microsoft and torchvision tables that windows can be read
from, timm nothing but the model's name in the hub's config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from swinv2_scale import geometry
from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.config.source import as_tuples
from swinv2_scale.config.tasks import CropMode, CropRule, Interpolation
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
    #: What of an image it was shown in evaluation.
    crop: CropRule | None = None

    def normalisation(self, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of pixels: as said, else ImageNet's for three channels, else a half."""
        default = _IMAGENET if in_channels == 3 else ((0.5,) * in_channels,) * 2
        return self.pixel_mean or default[0], self.pixel_std or default[1]


def shape_fields(
    shapes: Mapping[str, Sequence[int]], depths: Sequence[int], where: str, said_ratio: float | None
) -> dict[str, Any]:
    """The fields of ModelConfig that tensors' shapes fix.

    Args:
        said_ratio: the file's own word for mlp_ratio: several make the same widths.

    Raises:
        WeightsError: they are no Swin V2's.
    """

    def shape(name: str, num_axes: int) -> Sequence[int]:
        found = shapes.get(name, ())
        if len(found) != num_axes or not all(found):
            raise WeightsError(f"{where}: {name} has shape {tuple(found)}, a Swin V2's has {num_axes} axes")
        return found

    dim, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    stages = range(len(depths))
    fields: dict[str, Any] = {
        "embed_dim": dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "depths": tuple(depths),
        "num_heads": tuple(shape(f"layers.{i}.blocks.0.attn.logit_scale", 3)[0] for i in stages),
        "mlp_ratio": _mlp_ratio([shape(f"layers.{i}.blocks.0.mlp.fc1.weight", 2) for i in stages], said_ratio, where),
        "num_classes": shape("head.weight", 2)[0] if "head.weight" in shapes else 0,
        **_extra_norm_fields(shapes, depths, where),
    }
    compared = ("embed_dim", "depths")
    same = [name for name, variant in VARIANTS.items() if all(variant[key] == fields[key] for key in compared)]
    return {"variant": same[0] if same else "tiny", **fields}


def _mlp_ratio(widths: Sequence[Sequence[int]], said: float | None, where: str) -> float:
    """The ratio that gives all of these (hidden width, width) by ``int(width * ratio)``."""
    low = max(hidden / width for hidden, width in widths)
    # The quotient may be rounded down, and then make one less.
    for ratio in (said, low, math.nextafter(low, math.inf)):
        if isinstance(ratio, float) and all(int(width * ratio) == hidden for hidden, width in widths):
            return ratio
    raise WeightsError(f"{where}: the shapes of mlp.fc1.weight, {widths}, are of no common mlp_ratio")


def crop_rule(crop_pct: Any, crop_mode: Any, interpolation: Any) -> CropRule:
    """A crop rule from JSON.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct!r}")
    if crop_mode not in get_args(CropMode) or interpolation not in get_args(Interpolation):
        raise ValueError(f"a crop of {crop_mode!r}, {interpolation!r}")
    return CropRule(float(crop_pct), crop_mode, interpolation)


def native_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """A ModelConfig from JSON: lists become tuples again."""
    return {key: as_tuples(value) for key, value in model.items()}


def microsoft_facts(raw: Mapping[str, Tensor], config: Any, patch_size: int, num_stages: int) -> Facts:
    """From the configuration that its trainer saves, else from the tables that its model keeps."""
    try:
        swin = config["MODEL"]["SWINV2"]
        fields = {"image_size": as_tuples(config["DATA"]["IMG_SIZE"]), "window_size": as_tuples(swin["WINDOW_SIZE"])}
        windows = tuple(as_tuples(size) for size in swin["PRETRAINED_WINDOW_SIZES"])
        return Facts(fields | ({"pretrained_window_sizes": windows} if any(windows) else {}))
    except (KeyError, TypeError):
        fields = _table_fields(raw, [f"layers.{stage}.blocks.0.attn." for stage in range(num_stages)])
        # A mask for every window; none is kept where the first map is a single window, nor by some trainers.
        mask = raw.get("layers.0.blocks.1.attn_mask")
        if fields and mask is not None and isinstance(fields["window_size"], int):
            fields["image_size"] = math.isqrt(len(mask)) * fields["window_size"] * patch_size
        return Facts(fields)


def torchvision_facts(raw: Mapping[str, Tensor], num_stages: int) -> Facts:
    """From the tables of offsets; the image size is nowhere."""
    return Facts(_table_fields(raw, [f"features.{2 * stage + 1}.0.attn." for stage in range(num_stages)]))


def _table_fields(raw: Mapping[str, Tensor], stages: Sequence[str]) -> dict[str, Any]:
    """Window and pretrained windows, from the table of offsets that the first block of each stage keeps."""
    windows, pretrained = [], []
    for prefix in stages:
        table = raw.get(f"{prefix}relative_coords_table")
        if table is None or table.ndim != 4 or table.shape[-1] != 2 or not table.numel() or not table.isfinite().all():
            return {}
        window = ((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2)
        windows.append(window)
        # Offsets run to log2(8 * (window - 1) / (pretrained - 1) + 1) / 3 on each axis.
        largest = [(2 ** (3 * float(table[..., axis].max())) - 1) / 8 for axis in (0, 1)]
        pretrained.append(
            tuple(
                round((length - 1) / high) + 1 if length > 1 and high > 0 else 1
                for length, high in zip(window, largest, strict=True)
            )
        )
    return {"window_size": _number(max(windows)), "pretrained_window_sizes": tuple(map(_number, pretrained))}


def _number(size: geometry.Size) -> int | geometry.Size:
    """One number for a square."""
    return size[0] if len({*size}) == 1 else size


def timm_fields(config: Mapping[str, Any], num_stages: int) -> dict[str, Any]:
    """From a hub folder's config.json: its name, like ``swinv2_base_window12to24_192to384``, and what overrides that.

    The released ...to... models began at 192/12, which their names say.
    """
    match = re.search(r"^swinv2_\w*?window(\d+)(to(\d+))?_(\d+)(to(\d+))?", str(config.get("architecture", "")))
    said = config.get("model_args")
    said = said if isinstance(said, dict) else {}
    fields: dict[str, Any] = {}
    if match:
        fields = {"window_size": int(match[3] or match[1]), "image_size": int(match[6] or match[4])}
        if match[2]:
            maps = geometry.stage_maps((int(match[4]),), 4, num_stages)
            fields["pretrained_window_sizes"] = tuple(min(int(match[1]), size[0]) for size in maps)
    names = {
        "img_size": "image_size",
        "window_size": "window_size",
        "pretrained_window_sizes": "pretrained_window_sizes",
    }
    return fields | {ours: as_tuples(said[theirs]) for theirs, ours in names.items() if theirs in said}


def _extra_norm_fields(shapes: Mapping[str, Sequence[int]], depths: Sequence[int], where: str) -> dict[str, Any]:
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
    raise WeightsError(f"{where}: norms on the main branch (norm3) after blocks {found}, which no counting gives")
