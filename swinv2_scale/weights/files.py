"""Files and folders of tensors. They are mapped into memory, not read; nothing in them can run code."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swinv2_scale.durable import open_plain
from swinv2_scale.errors import WeightsError

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
#: Where trainers put the weights inside a pickled file, the first that holds tensors.
_INSIDE = ("model", "state_dict", "module", "model_state_dict")
_AGAIN = "copy or download it again"


class _InertNamespace:
    """Stands for ``argparse.Namespace`` in files of timm's trainer: holds what was pickled, does nothing."""


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A folder as Hugging Face writes it: one file, or shards and an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.exists():
            return _read_shards(path, index), {}
        if (path / name).exists():
            return read_file(path / name)
    holds = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
    raise WeightsError(
        f"{path} holds neither model.safetensors nor pytorch_model.bin, with or without an index; it holds: {holds}",
        "give the file itself, or a folder as Hugging Face saves it",
    )


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, mapped; and what else is in the file.

    Raises:
        WeightsError: damaged, no weights, or a pickle that would run code.
    """
    if path.suffix not in _SUFFIXES:
        raise WeightsError(f"{path}: weights end with one of {', '.join(_SUFFIXES)}")
    _refuse_what_downloads_leave(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is no whole safetensors file: {error}", _AGAIN) from None
    data = _unpickle(path)
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise WeightsError(f"{path} holds a {kind}, not named tensors", "save model.state_dict() instead")
    extra = {str(key): value for key, value in data.items()}
    for inside in (*(extra.get(key) for key in _INSIDE), extra):
        raw = {str(name): v for name, v in inside.items() if isinstance(v, Tensor)} if isinstance(inside, dict) else {}
        if raw:
            return raw, extra
    raise WeightsError(f"{path} holds no tensors; its keys: {', '.join(sorted(extra)[:6])}")


def json_beside(path: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in the folder, or next to the file; None where there is none.

    Raises:
        WeightsError: it can't be read.
    """
    place = (path if path.is_dir() else path.parent) / name
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{place} can't be read: {error}", "copy it again") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{place} holds no object", "copy it again")
    return data


def _read_shards(path: Path, index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} can't be read: {error!r}", "copy the folder again, whole") from None
    raw: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or not (path / shard).exists():
            raise WeightsError(f"{index.name} names {shard}, which is not in {path}", "copy the folder again, whole")
        raw |= read_file(path / shard)[0]
    lacking = sorted(set(places) - set(raw))
    if lacking:
        raise WeightsError(f"{path}: {len(lacking)} tensors of {index.name} are in no shard: {', '.join(lacking[:4])}")
    return raw


def _refuse_what_downloads_leave(path: Path) -> None:
    """A web page or a pointer of Git LFS under the name of the file; and what is no file at all."""
    try:
        with open_plain(path) as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error}") from None
    kinds = {b"<": "an HTML or XML page", b"version https://git-lfs": "a pointer of Git LFS"}
    found = next((what for beginning, what in kinds.items() if start.startswith(beginning)), "")
    if found:
        raise WeightsError(
            f"{path} is {found}, not the file itself", "download the file (git lfs pull, or its own link)"
        )


def _unpickle(path: Path) -> Any:
    """A file of torch.save, whose pickle may make tensors and plain containers only."""
    # Two classes that trainers leave in their files, neither of them with code: as containers of ours.
    inert: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), (_InertNamespace, "argparse.Namespace")]
    with torch.serialization.safe_globals(inert):
        for mapped in (True, False):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except UnpicklingError as error:
                raise _refusal(path, error) from None
            except Exception as error:  # what a damaged file raises depends on the byte
                if mapped and "mmap can only be used" in str(error):
                    continue  # the format of before torch 1.6, or no file of torch's at all
                line = str(error).splitlines()[0] if str(error) else repr(error)
                raise WeightsError(f"{path} is no whole file of torch.save: {line}", _AGAIN) from None
    raise AssertionError("one of the two ways has returned or raised")


def _refusal(path: Path, error: UnpicklingError) -> WeightsError:
    """torch's own text advises to load such a file unsafely."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ([\w.]+)", str(error))
    if found is None:
        return WeightsError(f"{path} is no whole file of torch.save", _AGAIN)
    return WeightsError(
        f"{path} holds more than tensors and plain containers ({found[1]}): loading it could run code, so it wasn't",
        "where you trust it, load it and save model.state_dict() alone",
    )
