"""Weights in whatever format they are, as named tensors that are read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from swinv2_scale.config.model import ModelConfig, PretrainedWindows
from swinv2_scale.config.rules import model_problems
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights import facts as facts_of
from swinv2_scale.weights import hugging_face
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.files import json_beside, read_file, read_folder
from swinv2_scale.weights.names import (
    FORMAT_NAMES,
    FORMATS,
    Format,
    Rule,
    depths_of,
    detect,
    is_buffer,
    normalise,
    rules,
    seems_to_be,
)

#: Key of our part in the header of a safetensors file.
METADATA_KEY = "swinv2_scale"


@dataclass(frozen=True)
class Weights:
    """Named tensors under our names."""

    where: str
    style: Format
    facts: Facts
    #: Shape and type of every tensor, in the model's order, on the meta device.
    metas: Mapping[str, Tensor]
    #: Reads one.
    tensor: Callable[[str], Tensor]
    #: What the file holds beside them, by its own name, and why that isn't needed.
    dropped: Mapping[str, str]

    @cached_property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of ModelConfig that the tensors' shapes fix."""
        shapes = {name: tuple(meta.shape) for name, meta in self.metas.items()}
        return facts_of.shape_fields(
            shapes, depths_of(self.metas, "native"), self.where, self.facts.model.get("mlp_ratio")
        )

    @cached_property
    def model_fields(self) -> dict[str, Any]:
        """All fields of ModelConfig that are known: from the source's own words, and from shapes."""
        said = self.facts.model
        return {**said, **self.shape_fields, **({"variant": said["variant"]} if "variant" in said else {})}

    @cached_property
    def trained_windows(self) -> PretrainedWindows | None:
        """The windows that the position biases were first trained with; None where the source doesn't say.

        Raises:
            WeightsError: what it says is no geometry of this model.
        """
        known = self.model_fields
        given = known.get("pretrained_window_sizes")
        stages = len(known["depths"])
        if given and (not isinstance(given, tuple) or len(given) != stages):
            raise WeightsError(
                f"{self.where}: pretrained_window_sizes {given!r} are not one for each of {stages} stages"
            )
        config = self._validated(known)
        if (given and all(given)) or {"image_size", "window_size"} <= set(known):
            return config.settled.pretrained_window_sizes
        return None

    def config(self, **fields: Any) -> ModelConfig:
        """The model that these weights are of, with some fields given, its pretrained windows spelled out.

        Raises:
            WeightsError: the image size or the window is known from nowhere, the fields make no model, or another one
                than the tensors are of.
        """
        shapes = self.shape_fields
        wrong = [key for key in fields if key != "variant" and shapes.get(key, fields[key]) != fields[key]]
        if wrong:
            found = ", ".join(f"{key} is {shapes[key]}" for key in wrong)
            raise WeightsError(f"{self.where}: by its tensors' shapes {found}", f"leave out {', '.join(wrong)}")
        trained = self.trained_windows
        known = {**self.model_fields, **({"pretrained_window_sizes": trained} if trained else {}), **fields}
        lacking = [key for key in ("image_size", "window_size", "pretrained_window_sizes") if key not in known]
        if lacking:
            own = list((0,) * len(shapes["depths"]))
            raise WeightsError(
                f"{self.where} doesn't say {', '.join(lacking)} of its model",
                f"say them (--set on the command line); pretrained_window_sizes={own} means: its own windows",
            )
        config = self._validated(known)
        if trained and config.settled.pretrained_window_sizes != trained:
            raise WeightsError(
                f"{self.where} was pre-trained with windows {list(trained)}, not {fields['pretrained_window_sizes']}",
                "leave out pretrained_window_sizes",
            )
        problems = model_problems(config)
        if problems:
            raise WeightsError("\n  - ".join([f"{self.where} makes no model:", *map(str, problems)]))
        return config.settled

    def _validated(self, fields: dict[str, Any]) -> ModelConfig:
        try:
            return ModelConfig.model_validate(fields)
        except ValidationError as error:
            raise WeightsError(f"{self.where} makes no model: {_first_problems(error)}") from None


def open_weights(path: str | Path) -> Weights:
    """Microsoft's .pth, a Hugging Face folder or safetensors, timm's, torchvision's, or ours; detected by the names.

    Raises:
        WeightsError: nothing there, damaged, a pickle with code in it, or another model; says what it seems to be.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder", "check the path")
    raw, extra = read_folder(path) if path.is_dir() else read_file(path)
    new_names = normalise(raw)
    renamed = {new: raw[name] for name, new in new_names.items()}
    if len(renamed) < len(raw):
        twice = next(name for name, new in new_names.items() if raw[name] is not renamed[new])
        raise WeightsError(f"{path} holds two sets of weights, {twice} is there twice", "save one of them alone")
    style = detect(renamed)
    if style is None:
        raise WeightsError(
            f"{path} seems to be {seems_to_be(renamed)}; its first names: {', '.join(sorted(raw)[:4])}",
            "give weights of a Swin V2: Microsoft's, Hugging Face's, timm's, torchvision's or ours",
        )
    table = rules(style, depths_of(renamed, style))
    _check_complete(renamed, table, style, path)
    weights = _named(str(path), style, renamed, table)
    style, facts = _known(weights, renamed, extra, path)
    weights = replace(weights, style=style, facts=facts)
    _ = weights.trained_windows  # raises where what the file says can't be
    return weights


def _named(where: str, style: Format, raw: Mapping[str, Tensor], table: list[Rule]) -> Weights:
    """Tensors under a format's own names as tensors under ours."""
    sources: dict[str, tuple[Rule, int]] = {}
    metas: dict[str, Tensor] = {}
    for rule in table:
        if rule.theirs and all(name in raw for name in rule.theirs):
            try:
                parts = rule.unpack([raw[name].to("meta") for name in rule.theirs])
            except RuntimeError as error:
                raise WeightsError(f"{where}: {', '.join(rule.theirs)} don't fit together: {error}") from None
            for position, (name, meta) in enumerate(zip(rule.ours, parts, strict=True)):
                sources[name] = (rule, position)
                metas[name] = meta

    def tensor(name: str) -> Tensor:
        rule, position = sources[name]
        return rule.unpack([raw[part] for part in rule.theirs])[position]

    dropped = {name: "computed anew" for name in raw if is_buffer(name)}
    return Weights(where, style, Facts(), metas, tensor, dropped)


def _check_complete(raw: Mapping[str, Tensor], table: list[Rule], style: Format, path: Path) -> None:
    expected = [name for rule in table for name in rule.theirs]
    unknown = sorted(set(raw) - set(expected) - {name for name in raw if is_buffer(name)})
    missing = [name for name in expected if name not in raw and not _is_optional(name, raw)]
    strange = [name for name in expected if name in raw and not _is_plain(raw[name])]
    if not (unknown or missing or strange):
        return
    lines = [f"{path} has {FORMAT_NAMES[style]}'s names of a Swin V2, but not all of its tensors"]
    kinds = ((missing, "missing"), (unknown, "unknown"), (strange, "no plain floating point tensors"))
    for names, what in kinds:
        if names:
            lines.append(f"  {len(names)} {what}: {', '.join(names[:4])}{', ..' if len(names) > 4 else ''}")
    raise WeightsError(
        "\n".join(lines), "use the whole file, unquantised; other parts than a Swin V2's can't be loaded"
    )


def _is_optional(name: str, raw: Mapping[str, Tensor]) -> bool:
    """A part that a model may lack; of a part with a weight and a bias, both or none."""
    if not (name.startswith(("head.", "classifier.", "decoder.")) or name.endswith("mask_token") or ".norm3." in name):
        return False
    stem = name.rpartition(".")[0]
    return name.endswith("mask_token") or not {f"{stem}.weight", f"{stem}.bias"} & set(raw)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _known(weights: Weights, raw: Mapping[str, Tensor], extra: Mapping[str, Any], path: Path) -> tuple[Format, Facts]:
    """What the file says beside its tensors, and its format by its own word where it has one."""
    shapes, style = weights.shape_fields, weights.style
    if METADATA_KEY in extra:
        return _own_words(extra[METADATA_KEY], path)
    num_stages = len(shapes["depths"])
    if style == "timm":
        return style, Facts(facts_of.timm_fields(json_beside(path, "config.json") or {}, num_stages))
    if style == "torchvision":
        return style, facts_of.torchvision_facts(raw, num_stages)
    if style == "hf":
        config = json_beside(path, "config.json")
        if config is None:
            raise WeightsError(
                f"{path} has Hugging Face's names, but there is no config.json with it: without it nobody knows the "
                "window, nor the window it was pre-trained with",
                f"put the model's config.json into {path if path.is_dir() else path.parent}",
            )
        preprocessor = json_beside(path, "preprocessor_config.json") or {}
        return style, hugging_face.facts_of_json(config, preprocessor, shapes, str(path))
    return style, facts_of.microsoft_facts(raw, extra.get("config"), shapes["patch_size"], num_stages)


def _own_words(text: Any, path: Path) -> tuple[Format, Facts]:
    try:
        data = json.loads(text)
        mean, std, labels = (data.get(key) for key in ("pixel_mean", "pixel_std", "labels"))
        crop = data.get("crop")
        style: Format = data["format"]
        if style not in FORMATS:
            raise ValueError(f"format {style!r}")
        return style, Facts(
            facts_of.native_fields(data["model"]),
            tuple(mean) if mean else None,
            tuple(std) if std else None,
            tuple(labels) if labels else None,
            facts_of.crop_rule(*crop) if crop else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: its own description ({METADATA_KEY}) can't be read: {error!r}") from None


def _first_problems(error: ValidationError) -> str:
    found = error.errors(include_url=False)[:4]
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}, not {item['input']!r}" for item in found)
