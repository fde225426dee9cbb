"""Open weights in whatever format they are, as named tensors that are read one at a time.

Files are mapped into memory, not read; nothing in them can run code.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swinv2_scale.config.model import ModelConfig, PretrainedWindows
from swinv2_scale.config.rules import model_problems
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights import facts as facts_of
from swinv2_scale.weights import hugging_face
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.names import (
    FORMAT_NAMES,
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
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
#: Where trainers put the weights inside a pickled file, the first that is there.
_INSIDE = ("model", "state_dict", "module", "model_state_dict")


class _InertNamespace:
    """Stands for ``argparse.Namespace`` in files of timm's trainer: holds what was pickled, does nothing."""


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

    @property
    def model_fields(self) -> dict[str, Any]:
        """All fields of ModelConfig that are known: from the source's own words, and from shapes."""
        shapes = {name: tuple(meta.shape) for name, meta in self.metas.items()}
        # Shapes can't be wrong, so they come last; but only the file knows a variant's name.
        said = {key: value for key, value in self.facts.model.items() if key == "variant"}
        return {**self.facts.model, **facts_of.shape_fields(shapes, depths_of(self.metas, "native")), **said}

    @property
    def trained_windows(self) -> PretrainedWindows | None:
        """The windows that the position biases were first trained with; None where the source doesn't say.

        Raises:
            WeightsError: what it says is no geometry of this model.
        """
        known = self.model_fields
        given = known.get("pretrained_window_sizes") or ()
        if given and all(given):
            return tuple(given)
        if not {"image_size", "window_size"} <= set(known):
            return None
        return self._validated(known).settled.pretrained_window_sizes

    def config(self, **fields: Any) -> ModelConfig:
        """The model that these weights are of, with some fields given, its pretrained windows spelled out.

        Raises:
            WeightsError: the image size or the window is known from nowhere, or the fields make no model.
        """
        known = {**self.model_fields, "pretrained_window_sizes": self.trained_windows, **fields}
        lacking = [key for key in ("image_size", "window_size") if key not in known]
        if lacking:
            raise WeightsError(
                f"{self.where} doesn't say with which {' and '.join(lacking)} its model is run",
                f"say {' and '.join(f'{key}=NUMBER' for key in lacking)} (after --set on the command line)",
            )
        return self._validated(known).settled

    def _validated(self, fields: dict[str, Any]) -> ModelConfig:
        try:
            config = ModelConfig.model_validate(fields)
        except ValidationError as error:
            raise WeightsError(f"{self.where} makes no model: {_first_problems(error)}") from None
        problems = model_problems(config)
        if problems:
            raise WeightsError("\n  - ".join([f"{self.where} makes no model:", *map(str, problems)]))
        return config


def open_weights(path: str | Path) -> Weights:
    """Microsoft's .pth, a Hugging Face folder or safetensors, timm's, torchvision's, or ours; detected by the names.

    Raises:
        WeightsError: nothing there, damaged, a pickle with code in it, or another model; says what it seems to be.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder", "check the path")
    config, preprocessor = _json_beside(path, "config.json"), _json_beside(path, "preprocessor_config.json")
    raw, extra = _read_folder(path) if path.is_dir() else _read_file(path)
    renamed = {new: raw[name] for name, new in normalise(raw).items()}
    style = detect(renamed)
    if style is None:
        raise WeightsError(
            f"{path} seems to be {seems_to_be(renamed)}; its first names: {', '.join(sorted(raw)[:4])}",
            "give weights of a Swin V2: Microsoft's, Hugging Face's, timm's, torchvision's or ours",
        )
    depths = depths_of(renamed, style)
    table = rules(style, depths)
    _check_complete(renamed, table, style, path)
    ours = extra.get(METADATA_KEY)
    if ours is not None:
        facts = _native_facts(ours, path)
        style = "native" if style == "microsoft" else style
    elif style == "hf":
        if config is None:
            raise WeightsError(
                f"{path} has Hugging Face's names, but there is no config.json with it: without it nobody knows the "
                "window, nor the window it was pre-trained with",
                f"put the model's config.json into {path if path.is_dir() else path.parent}",
            )
        facts = hugging_face.facts_of_json(config, preprocessor or {}, str(path))
    else:
        facts = _other_facts(style, renamed, extra, config or {}, depths)
    return from_raw(str(path), style, facts, renamed, table)


def from_raw(where: str, style: Format, facts: Facts, raw: Mapping[str, Tensor], table: list[Rule]) -> Weights:
    """Weights out of tensors under a format's own names."""
    sources: dict[str, tuple[Rule, int]] = {}
    metas: dict[str, Tensor] = {}
    for rule in table:
        if rule.theirs and all(name in raw for name in rule.theirs):
            parts = rule.unpack([raw[name].to("meta") for name in rule.theirs])
            for position, (name, meta) in enumerate(zip(rule.ours, parts, strict=True)):
                sources[name] = (rule, position)
                metas[name] = meta

    def tensor(name: str) -> Tensor:
        rule, position = sources[name]
        return rule.unpack([raw[part] for part in rule.theirs])[position]

    dropped = {name: "computed anew" for name in raw if is_buffer(name)}
    return Weights(where, style, facts, metas, tensor, dropped)


def _check_complete(raw: Mapping[str, Tensor], table: list[Rule], style: Format, path: Path) -> None:
    expected = [name for rule in table for name in rule.theirs]
    unknown = sorted(set(raw) - set(expected) - {name for name in raw if is_buffer(name)})
    missing = [name for name in expected if name not in raw and not _is_optional(name)]
    if not unknown and not missing:
        return
    lines = [f"{path} has {FORMAT_NAMES[style]}'s names of a Swin V2, but not all of them fit"]
    for count, what, names in ((len(missing), "missing", missing), (len(unknown), "unknown", unknown)):
        if names:
            lines.append(f"  {count} {what}: {', '.join(names[:4])}{', ..' if count > 4 else ''}")
    raise WeightsError(
        "\n".join(lines), "use the whole file; a model with other parts than a Swin V2's can't be loaded"
    )


def _is_optional(name: str) -> bool:
    return name.startswith(("head.", "classifier.", "decoder.")) or name.endswith("mask_token") or ".norm3." in name


def _other_facts(
    style: Format,
    raw: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    config: Mapping[str, Any],
    depths: tuple[int, ...],
) -> Facts:
    if style == "timm":
        return Facts(facts_of.timm_fields(str(config.get("architecture", ""))))
    if style == "torchvision":
        return facts_of.torchvision_facts(raw, depths)
    patch_size = raw["patch_embed.proj.weight"].shape[-1]
    return facts_of.microsoft_facts(raw, extra.get("config"), patch_size, depths)


def _native_facts(text: str, path: Path) -> Facts:
    try:
        data = json.loads(text)
        mean, std, labels = (data.get(key) for key in ("pixel_mean", "pixel_std", "labels"))
        return Facts(
            facts_of.native_fields(data["model"]),
            tuple(mean) if mean else None,
            tuple(std) if std else None,
            tuple(labels) if labels else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its header's {METADATA_KEY} entry can't be read: {error!r}") from None


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A folder as Hugging Face writes it: one file, or shards and an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.exists():
            return _read_shards(path, index), {}
        if (path / name).exists():
            return _read_file(path / name)
    holds = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
    raise WeightsError(
        f"{path} holds neither model.safetensors nor pytorch_model.bin, with or without an index; it holds: {holds}",
        "give the file itself, or a folder as Hugging Face saves it",
    )


def _read_shards(path: Path, index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} can't be read: {error!r}", "copy the folder again, whole") from None
    raw: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or not (path / shard).exists():
            raise WeightsError(f"{index.name} names {shard}, which is not in {path}", "copy the folder again, whole")
        raw |= _read_file(path / shard)[0]
    lacking = sorted(set(places) - set(raw))
    if lacking:
        raise WeightsError(f"{path}: {len(lacking)} tensors of {index.name} are in no shard: {', '.join(lacking[:4])}")
    return raw


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, mapped; and what else is in the file."""
    if path.suffix not in _SUFFIXES:
        raise WeightsError(f"{path}: weights end with one of {', '.join(_SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is no whole safetensors file: {error}", "copy or download it again") from None
    data = _unpickle(path)
    if not isinstance(data, dict):
        raise WeightsError(
            f"{path} holds a {type(data).__name__}, not named tensors", "save model.state_dict() instead"
        )
    extra = {str(key): value for key, value in data.items()}
    inside = next((extra[key] for key in _INSIDE if isinstance(extra.get(key), dict)), data)
    raw = {str(name): value for name, value in inside.items() if isinstance(value, Tensor)}
    if not raw:
        raise WeightsError(f"{path} holds no tensors; its keys: {', '.join(sorted(extra)[:6])}")
    return raw, extra


def _unpickle(path: Path) -> Any:
    """A file of torch.save, whose pickle may make tensors and plain containers only."""
    # Two classes that trainers leave in their files, neither of them with code: as containers of ours.
    inert: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), (_InertNamespace, "argparse.Namespace")]
    with torch.serialization.safe_globals(inert):
        for mapped in (True, False):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except UnpicklingError as error:
                raise WeightsError(
                    _refused(path, error), "load it where you trust it, and save model.state_dict()"
                ) from None
            except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
                if mapped and "mmap can only be used" in str(error):
                    continue  # the format of before torch 1.6, or no file of torch's at all
                line = str(error).splitlines()[0] if str(error) else repr(error)
                raise WeightsError(
                    f"{path} is no whole file of torch.save: {line}", "copy or download it again"
                ) from None
    raise AssertionError("one of the two ways has returned or raised")


def _refused(path: Path, error: UnpicklingError) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads the pickle that was just refused: anything can be in there
        names = []
    if names:
        return f"{path} wants to run code when it is loaded ({', '.join(names[:4])}); it was not run"
    return f"{path} is no file of torch.save: {str(error).splitlines()[-1][:200]}"


def _first_problems(error: ValidationError) -> str:
    found = error.errors(include_url=False)[:4]
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}, not {item['input']!r}" for item in found)


def _json_beside(path: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in the folder, or next to the file."""
    place = (path if path.is_dir() else path.parent) / name
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{place} can't be read: {error}", "copy it again") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{place} holds no object", "copy it again")
    return data
