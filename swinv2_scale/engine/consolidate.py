"""The float32 weights of a checkpoint, whole, whatever number of processes, ZeRO stage and precision wrote it.

How DeepSpeed 0.19.8 lays them out over W ranks:

    stage 0      mp_rank_00_model_states.pt has every weight; in bf16 the float32 masters lie beside them, without
                 names: a list for each parameter group
    stage 1, 2   each *_optim_states.pt has a W-th of every parameter group, flat, and says which parameter starts where
    stage 3      each *_optim_states.pt has a W-th of every parameter (the last rank's padded with zeros), flat, in the
                 order of param_shapes; one flat tensor for each part of a parameter group that is updated at once

DeepSpeed's own zero_to_fp32.py runs whatever code its files hold, and doesn't know stage 0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from swinv2_scale.engine.checkpoint import ALLOWED_CLASSES, Checkpoint, FileRecord
from swinv2_scale.engine.optim import is_decayed
from swinv2_scale.errors import CheckpointError

_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_(model|optim)_states\.pt")
_WRITTEN_BY_OTHERS = "read it with the versions that wrote it (see its state.json)"


@dataclass(frozen=True)
class _Span:
    """Where values lie: the same span of each of these flat tensors, one after the other."""

    flats: tuple[Tensor, ...]
    start: int
    numel: int


class MasterWeights:
    """Every parameter of a checkpoint: whole, in float32, one at a time, by one process without the model.

    The values are the float32 masters that the optimizer updates, to the last bit; never weights rounded to bf16,
    except for frozen parameters of a bf16 model, which have no others. Files are mapped: memory holds what was asked.

    Attributes:
        shapes: whole shapes under the names of the training model, in its order.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open the files; no values are read yet, so nothing is compared with the manifest but sizes.

        Raises:
            CheckpointError: a file is missing, cut or can't be read, or isn't laid out as expected.
        """
        self._path, world_size = checkpoint.path, checkpoint.world_size
        self._rounded: dict[str, Tensor] = {}
        with _as_expected(self._path):
            models, optimizers = _files(checkpoint, "model"), _files(checkpoint, "optim")
            _require(0 in models, "no model file of rank 0 in its manifest")
            model = _open(checkpoint, models[0])
            stage = model["ds_config"]["zero_optimization"]["stage"]
            names = [name for name in model["module"] if name not in model["buffer_names"]]
            _require(not model["shared_params"], "parameters that share their values")
            trained = {name for group in model["param_shapes"] or [names] for name in group}
            ranks = list(range(world_size))
            found = f"{len(models)} model and {len(optimizers)} optimizer files of {world_size} ranks at stage {stage}"
            expected = [ranks if stage == 3 else [0], ranks if stage else []]
            _require([list(models), list(optimizers)] == expected, found)
            states = [_open(checkpoint, record)["optimizer_state_dict"] for record in optimizers.values()]
            if stage == 3:
                others = ranks[1:] if model["frozen_param_shapes"] else []
                shapes, self._spans = _parts([model, *(_open(checkpoint, models[rank]) for rank in others)], states)
                self.shapes = {name: torch.Size(shapes[name]) for name in names}
            else:
                weights = {name: model["module"][name] for name in names}
                self.shapes = {name: weight.shape for name, weight in weights.items()}
                self._spans = _slices(weights, trained, states) if stage else self._lists(weights, model["optimizer"])
            _check(self.shapes, self._spans, trained, padding=world_size - 1 if stage == 3 else 0)

    @torch.no_grad()  # DeepSpeed saves masters that require gradients
    def tensor(self, name: str) -> Tensor:
        """A parameter's values: float32, contiguous, in memory of its own.

        Raises:
            KeyError: the model has no such parameter.
            CheckpointError: the value doesn't belong to this name.
        """
        shape = self.shapes[name]
        flat = torch.empty(shape.numel())
        filled = 0
        for span in self._spans[name]:
            for source in span.flats:
                part = source.flatten().narrow(0, span.start, span.numel)[: flat.numel() - filled]
                flat[filled : filled + part.numel()].copy_(part)
                filled += part.numel()
        value = flat.reshape(shape)
        if name in self._rounded and not torch.equal(value.to(self._rounded[name].dtype), self._rounded[name]):
            found = f"{self._path}: the float32 value found for {name} isn't the one its weight was rounded from"
            raise CheckpointError(found, _WRITTEN_BY_OTHERS)
        return value

    def _lists(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> dict[str, list[_Span]]:
        """Stage 0. The masters' names follow from the groups that build_optimizer makes; tensor() checks the match."""
        if "fp32_groups" not in optimizer:
            return {name: [_whole(weight)] for name, weight in weights.items()}
        groups = optimizer["fp32_groups"]
        names = [[n for n in weights if is_decayed(n, self.shapes[n]) == is_first] for is_first in (True, False)]
        found, expected = [len(group) for group in groups], [len(group) for group in names]
        _require(found == expected, f"parameter groups of {found} masters where {expected} belong")
        self._rounded = weights
        return {name: [_whole(m)] for group in zip(names, groups, strict=True) for name, m in zip(*group, strict=True)}


def _files(checkpoint: Checkpoint, kind: str) -> dict[int, FileRecord]:
    """DeepSpeed's files of a kind by rank, in the order of ranks."""
    matches = [(match, record) for record in checkpoint.files if (match := _FILE.fullmatch(record.name))]
    return dict(sorted((int(match[1] or 0), record) for match, record in matches if match[2] == kind))


def _open(checkpoint: Checkpoint, record: FileRecord) -> Any:
    """A file's contents, its tensors mapped."""
    path = checkpoint.path / record.name
    try:
        found = path.stat().st_size  # touching a map past the end of its file would kill the process
        if found != record.bytes:
            raise EOFError(f"it has {found} bytes, its manifest says {record.bytes}")
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the byte
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        if isinstance(error, UnpicklingError):  # torch's own text advises to read it unsafely
            reason = "it is damaged, or holds more than tensors and plain data"
        advice = "restore it from a copy, or use another checkpoint of the run"
        raise CheckpointError(f"cannot read {path}: {reason}", advice) from error


def _slices(weights: dict[str, Tensor], trained: set[str], states: list[Any]) -> dict[str, list[_Span]]:
    """Stages 1 and 2: a parameter is on one rank, or on several one after the other. Frozen ones are in the model."""
    spans: dict[str, list[_Span]] = defaultdict(list)
    for state in states:
        flats = state["single_partition_of_fp32_groups"]
        for flat, addresses in zip(flats, state["param_slice_mappings"], strict=True):
            for name, address in addresses.items():
                spans[name].append(_Span((flat,), address.start, address.numel))
    return {name: spans[name] if name in trained else [_whole(weight)] for name, weight in weights.items()}


def _parts(models: list[Any], states: list[Any]) -> tuple[dict[str, torch.Size], dict[str, list[_Span]]]:
    """Stage 3: shapes, and a W-th of every parameter on each rank, rounded up."""
    shapes: dict[str, torch.Size] = dict(models[0]["frozen_param_shapes"])
    spans = {}
    for name in shapes:
        fragments = tuple(model["frozen_param_fragments"][name] for model in models)
        spans[name] = [_Span(fragments, 0, fragments[0].numel())]
    flats_by_group = zip(*(state["fp32_flat_groups"] for state in states), strict=True)
    for group, flats in zip(models[0]["param_shapes"], flats_by_group, strict=True):
        start = 0
        for name, shape in group.items():
            numel = -(-shape.numel() // len(states))
            spans[name] = [_Span(flats, start, numel)]
            start += numel
        found = sorted({flat.numel() for flat in flats})
        _require(found == [start], f"{found} masters on a rank where {start} belong")
        shapes |= group
    return shapes, spans


def _check(shapes: dict[str, torch.Size], spans: dict[str, list[_Span]], trained: set[str], padding: int) -> None:
    for name, shape in shapes.items():
        found = sum(span.numel * len(span.flats) for span in spans[name])
        _require(shape.numel() <= found <= shape.numel() + padding, f"{found} values of {name} {tuple(shape)}")
        for start, numel, flat in [(span.start, span.numel, flat) for span in spans[name] for flat in span.flats]:
            _require(0 <= start <= flat.numel() - numel, f"{name} past the end of its masters")
            _require(flat.dtype == torch.float32 or name not in trained, f"masters of {name} in {flat.dtype}")


def _whole(value: Tensor) -> _Span:
    return _Span((value,), 0, value.numel())


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


@contextmanager
def _as_expected(path: Path) -> Iterator[None]:
    """Turn what a wrong layout raises into our error."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        found = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} isn't laid out as DeepSpeed 0.19.8 does: {found}", _WRITTEN_BY_OTHERS) from error
