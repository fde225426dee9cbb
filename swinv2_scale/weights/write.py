"""Write named tensors in anyone's format, one tensor at a time.

A file appears under its name when it is whole; what a format can't hold is refused with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from swinv2_scale.config.model import EXECUTION_FIELDS, ModelConfig
from swinv2_scale.errors import OutputError, WeightsError
from swinv2_scale.weights import hugging_face
from swinv2_scale.weights.names import FORMAT_NAMES, FORMATS, Format, Rule, rules
from swinv2_scale.weights.read import METADATA_KEY, Weights

#: Hugging Face cuts larger models into files of this size.
SHARD_BYTES = 5 * 10**9
_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_PRETRAINING = ("mask_token", "decoder.")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file to be."""

    name: str
    meta: Tensor
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return self.meta.numel() * self.meta.itemsize


class _Packer:
    """Reads what several entries are cut from once: they are written one after the other."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[Rule | None, Sequence[Tensor]] = (None, ())

    def read(self, rule: Rule, position: int) -> Tensor:
        if self._last[0] is not rule:
            self._last = (None, ())  # let go of the one before first
            self._last = (rule, rule.pack([self._weights.tensor(name) for name in rule.ours]))
        return self._last[1][position]


def write_weights(weights: Weights, path: Path, style: Format, **fields: Any) -> tuple[str, ...]:
    """Write weights in a format.

    Args:
        path: a folder for ``hf``, else a file ending with .safetensors or .pth.
        fields: of ModelConfig, where the source doesn't say them: image_size, window_size, ..

    Returns:
        What was left out, as sentences.

    Raises:
        WeightsError: the format can't hold this model; says why.
        OutputError: it can't be written, or something is there already.
    """
    if style not in FORMATS:
        raise WeightsError(f"no format is called {style!r}", f"one of: {', '.join(FORMATS)}")
    _check_name(path, style)
    config = weights.config(**fields) if style != "timm" or _is_known(weights, fields) else None
    _refuse(weights, config, style)
    entries, left_out = _entries(weights, style)
    if style == "hf":
        assert config is not None
        _write_folder(path, entries, weights, config)
        return left_out
    if style == "torchvision":
        assert config is not None
        entries += _torchvision_tables(config)
    about = json.dumps(_about(weights, config, style)) if config else None
    with _appearing(path) as part:
        if path.suffix == ".safetensors":
            _write_safetensors(part, entries, {"format": "pt", **({METADATA_KEY: about} if about else {})})
        else:
            _write_pickle(part, entries, _beside(style, config, about))
    if style == "timm" and config:
        left_out += (
            f"timm's files don't say the geometry: give create_model img_size={config.image_size}, window_size="
            f"{config.window_size}, pretrained_window_sizes={config.pretrained_window_sizes}",
        )
    return left_out


def _check_name(path: Path, style: Format) -> None:
    is_file = path.suffix in (".safetensors", ".pth")
    if not path.name or is_file == (style == "hf"):
        what = "a folder" if style == "hf" else "one file"
        how = "a folder, without a suffix" if style == "hf" else "a file that ends with .safetensors or .pth"
        raise WeightsError(f"{str(path)!r}: {FORMAT_NAMES[style]}'s weights are {what}", f"name {how}")


def _is_known(weights: Weights, fields: Mapping[str, Any]) -> bool:
    said = {*weights.model_fields, *fields} | ({"pretrained_window_sizes"} if weights.trained_windows else set())
    return {"image_size", "window_size", "pretrained_window_sizes"} <= said


def _refuse(weights: Weights, config: ModelConfig | None, style: Format) -> None:
    """Before anything is written."""
    reason = ""
    norms = [name for name in weights.metas if name.endswith(".norm3.weight")]
    if norms and style != "native":
        reason = (
            f"its model has no norm on the main branch, this one has {len(norms)} ({norms[0]}, ..); left out, they "
            "would make another model"
        )
    elif style != "native" and config is not None:
        reason = _geometry_problem(config, style)
    if style == "microsoft" and "decoder.0.weight" in weights.metas and weights.shape_fields["in_channels"] != 3:
        reason = "its pixel head predicts 3 channels whatever the images have"
    names, num_classes = weights.facts.labels, weights.shape_fields["num_classes"]
    if names and num_classes and len(names) != num_classes:
        raise WeightsError(f"{len(names)} class names are given for {num_classes} classes", "give one for each")
    if reason:
        others = "native holds everything" if norms else "native holds everything; or export at another image size"
        raise WeightsError(f"{FORMAT_NAMES[style]}'s format can't hold this model: {reason}", others)


def _geometry_problem(config: ModelConfig, style: Format) -> str:
    """Why a format's own model can't compute this one's numbers at its image size; empty where it can."""
    image, window, pretrained = config.image_shape, config.window_shape, config.stage_pretrained_windows
    if style in ("hf", "microsoft") and len({*image}) + len({*window}) + max(len({*size}) for size in pretrained) > 3:
        return (
            f"image {config.image_size}, window {config.window_size} and pretrained windows "
            f"{config.pretrained_window_sizes} aren't all square, and its code decides by one side"
        )
    if style == "torchvision" and any(size != window for size in pretrained):
        return (
            f"it divides offsets by its own window ({config.window_size}) less one in every stage, this model was "
            f"pre-trained with {list(config.pretrained_window_sizes or ())}"
        )
    if any(length % config.patch_size for length in image):
        patches = f"image {config.image_size} doesn't divide into patches of {config.patch_size}"
        return f"{patches}, and its code drops pixels or lets tokens attend to padding"
    for stage, (map_size, used) in enumerate(zip(config.stage_maps, config.stage_windows, strict=True)):
        if style in ("hf", "microsoft") and 1 in (*map_size, *pretrained[stage]):
            return f"stage {stage} has a map or a pretrained window of one token, where its code divides by zero"
        if style in ("hf", "microsoft") and stage + 1 < config.num_stages and any(length % 2 for length in map_size):
            return f"stage {stage}'s map {map_size} is odd, and its code halves it otherwise than it merges it"
        tiled = window if style == "torchvision" else used  # it never clips a window
        if any(length % w for length, w in zip(map_size, tiled, strict=True)):
            return (
                f"stage {stage}'s map {map_size} doesn't divide into windows of {tiled}, and its code fails there or "
                "lets tokens attend to padding"
            )
    return ""


def _entries(weights: Weights, style: Format) -> tuple[list[_Entry], tuple[str, ...]]:
    depths = weights.model_fields["depths"]
    is_pretraining = any(name.startswith(_PRETRAINING) for name in weights.metas)
    packer = _Packer(weights)
    entries: list[_Entry] = []
    left_out: list[str] = []
    for rule in rules(style, depths):
        if not all(name in weights.metas for name in rule.ours):
            continue
        if not rule.theirs or (style == "hf" and is_pretraining and rule.ours[0].startswith("head.")):
            left_out += rule.ours
            continue
        metas = rule.pack([weights.metas[name] for name in rule.ours])
        for position, (name, meta) in enumerate(zip(rule.theirs, metas, strict=True)):
            final = _final_name(name, style, is_pretraining, weights)
            entries.append(_Entry(final, meta, partial(packer.read, rule, position)))
    said = f"{FORMAT_NAMES[style]}'s model has no {', '.join(left_out)}" if left_out else ""
    return entries, (said,) if said else ()


def _final_name(name: str, style: Format, is_pretraining: bool, weights: Weights) -> str:
    if style == "microsoft" and is_pretraining and not name.startswith("decoder."):
        return f"encoder.{name}"
    if style == "hf" and not is_pretraining and "head.weight" not in weights.metas:
        return name.removeprefix("swinv2.")  # a bare Swinv2Model
    return name


def _about(weights: Weights, config: ModelConfig, style: Format) -> dict[str, Any]:
    facts = weights.facts
    return {
        "format": style,
        "model": config.model_dump(exclude=EXECUTION_FIELDS),
        "pixel_mean": facts.pixel_mean,
        "pixel_std": facts.pixel_std,
        "labels": facts.labels,
        "crop": facts.crop,
    }


def _write_folder(path: Path, entries: list[_Entry], weights: Weights, config: ModelConfig) -> None:
    """A folder for from_pretrained."""
    names = {entry.name for entry in entries}
    kind = "ForMaskedImageModeling" if "decoder.0.weight" in names else "Model"
    architecture = "Swinv2" + ("ForImageClassification" if "classifier.weight" in names else kind)
    dtype = str(entries[0].meta.dtype).removeprefix("torch.")
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.num_bytes for e in shards[-1]) + entry.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    with _appearing(path) as part:
        part.mkdir()
        _write_json(part / "config.json", hugging_face.config_json(config, weights.facts, architecture, dtype))
        _write_json(part / "preprocessor_config.json", hugging_face.preprocessor_json(config, weights.facts))
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write_safetensors(part / name, shard, {"format": "pt"})
            places |= {entry.name: name for entry in shard}
        if len(shards) > 1:
            total = sum(entry.num_bytes for entry in entries)
            _write_json(
                part / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
            )


def _write_safetensors(path: Path, entries: list[_Entry], metadata: dict[str, str]) -> None:
    """The library's own writer wants all tensors at once; the format is a header and the bytes, so it is written here.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        kind = _SAFETENSORS_TYPES.get(entry.meta.dtype)
        if kind is None:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _SAFETENSORS_TYPES)
            raise WeightsError(f"{entry.name} is {entry.meta.dtype}; these can be written: {known}")
        ends = [offset, offset + entry.num_bytes]
        header[entry.name] = {"dtype": kind, "shape": list(entry.meta.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            value = entry.read().contiguous()
            assert value.shape == entry.meta.shape
            assert value.dtype == entry.meta.dtype
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _write_pickle(path: Path, entries: list[_Entry], extra: dict[str, Any]) -> None:
    """torch.save wants all tensors at once too: they come mapped, out of a file beside.

    Args:
        extra: what the file holds beside its ``model``; nothing: it is the tensors themselves.
    """
    beside = path.with_name(path.name + ".tensors")
    try:
        _write_safetensors(beside, entries, {})
        with safe_open(beside, framework="pt") as file:
            tensors = {entry.name: file.get_tensor(entry.name) for entry in entries}
            try:
                torch.save({"model": tensors, **extra} if extra else tensors, path)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(str(error).splitlines()[0]) from error
    finally:
        beside.unlink(missing_ok=True)


def _beside(style: Format, config: ModelConfig | None, about: str | None) -> dict[str, Any]:
    if style == "native":
        return {METADATA_KEY: about}
    return {"config": _microsoft_config(config)} if style == "microsoft" and config else {}


def _microsoft_config(config: ModelConfig) -> dict[str, Any]:
    """What its loader doesn't read and ours does; as in its YAML files."""
    swin = {
        "WINDOW_SIZE": config.window_size,
        "PRETRAINED_WINDOW_SIZES": config.pretrained_window_sizes,
        "EMBED_DIM": config.embed_dim,
        "DEPTHS": config.depths,
        "NUM_HEADS": config.num_heads,
    }
    return {"DATA": {"IMG_SIZE": config.image_size}, "MODEL": {"TYPE": "swinv2", "SWINV2": swin}}


def _torchvision_tables(config: ModelConfig) -> list[_Entry]:
    """The tables that its load_state_dict insists on, by its formulas."""
    window = config.window_shape
    axes = [torch.arange(-(length - 1), length, dtype=torch.float32) / max(length - 1, 1) for length in window]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None] * 8
    table = torch.sign(offsets) * torch.log2(offsets.abs() + 1.0) / 3.0
    rows, columns = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    differences = [
        part[:, None] - part[None] + length - 1 for part, length in zip((rows, columns), window, strict=True)
    ]
    index = (differences[0] * (2 * window[1] - 1) + differences[1]).flatten()
    entries = []
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            prefix = f"features.{2 * stage + 1}.{block}.attn."
            for name, value in (("relative_coords_table", table), ("relative_position_index", index)):
                entries.append(_Entry(prefix + name, value.to("meta"), lambda value=value: value))  # type: ignore[misc]
    return entries


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write under; what is written there appears as ``path`` if nothing fails, and is deleted otherwise."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        if path.exists():
            raise OutputError(f"{path} is there already; nothing is overwritten", "name another, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(path)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error}", "make room there, or name another place") from error
    finally:
        _delete(part)


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # leaves a file as it is
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
