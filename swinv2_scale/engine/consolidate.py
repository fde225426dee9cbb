"""What a checkpoint holds of every parameter, whatever number of processes, ZeRO stage and precision wrote it.

How DeepSpeed 0.19.8 lays them out over W ranks:

    stage 0      mp_rank_00_model_states.pt has every weight; in bf16 the float32 masters lie beside them, without
                 names: a list for each parameter group. Moments are numbered over the groups
    stage 1, 2   each *_optim_states.pt has a W-th of every parameter group, flat, and says which parameter starts where
    stage 3      each *_optim_states.pt has a W-th of every parameter (the last rank's padded with zeros), flat, in the
                 order of param_shapes; one flat tensor for each part of a parameter group that is updated at once

Moments (and the average of engine/adamw.py) are cut as the masters are, as AdamW steps on these flat tensors.
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

from swinv2_scale.engine.checkpoint import Checkpoint, FileRecord
from swinv2_scale.engine.deepspeed_import import LossScaler, ZeroStageEnum, fragment_address
from swinv2_scale.errors import CheckpointError
from swinv2_scale.plan.parameters import parameter_groups

#: The only classes that a DeepSpeed checkpoint of ours may hold beside tensors and plain data: an enum and a number
#: holder, and three integers that stage 1 writes in bf16.
ALLOWED_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_(model|optim)_states\.pt")
_WRITTEN_BY_OTHERS = "read it with the versions that wrote it (see its state.json)"


#: What AdamW steps on, and what it remembers of it: "master", "exp_avg", "exp_avg_sq", "ema", "step".
_Holder = dict[str, Tensor]


@dataclass(frozen=True)
class _Span:
    """Where values lie: the same span of each of these holders' flat tensors, one after the other."""

    holders: tuple[_Holder, ...]
    start: int
    numel: int


class SavedTensors:
    """Every parameter of a checkpoint: whole or a part, in float32, one at a time, by one process without the model.

    Masters are the float32 masters that the optimizer updates, to the last bit; never weights rounded to bf16,
    except for frozen parameters of a bf16 model, which have no others. Files are mapped: memory holds what was asked.

    Attributes:
        shapes: whole shapes under the names of the training model, in its order.
        kinds: what there is of every trained parameter: "master", and "exp_avg", "exp_avg_sq", "ema" once it was
            updated.
        num_updates: how often AdamW has stepped.
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
            holders = [holder for n in trained for span in self._spans[n] for holder in span.holders]
            self.kinds = frozenset.intersection(*(frozenset(holder) for holder in holders)) - {"step"}
            updates = {int(holder["step"]) for holder in holders if "step" in holder} or {0}
            _require(len(updates) == 1, f"parameters that were updated {sorted(updates)} times")
            self.num_updates = updates.pop()

    @torch.no_grad()  # DeepSpeed saves masters that require gradients
    def read(self, name: str, first: int, out: Tensor, kind: str = "master") -> None:
        """Fill a flat tensor with a parameter's values from number ``first`` on, rounded to its type."""
        position = 0
        for span in self._spans[name]:
            for holder in span.holders:
                low, high = max(first, position), min(first + out.numel(), position + span.numel)
                if low < high:
                    source = holder[kind].flatten().narrow(0, span.start + low - position, high - low)
                    out.narrow(0, low - first, high - low).copy_(source)
                position += span.numel

    def tensor(self, name: str, kind: str = "master") -> Tensor:
        """A parameter's values: float32, contiguous, in memory of its own.

        Raises:
            KeyError: the model has no such parameter, or the checkpoint nothing of this kind.
            CheckpointError: the value doesn't belong to this name.
        """
        shape = self.shapes[name]
        flat = torch.empty(shape.numel())
        self.read(name, 0, flat, kind)
        value = flat.reshape(shape)
        rounded = self._rounded.get(name) if kind == "master" else None
        if rounded is not None and not torch.equal(value.to(rounded.dtype), rounded):
            found = f"{self._path}: the float32 value found for {name} isn't the one its weight was rounded from"
            raise CheckpointError(found, _WRITTEN_BY_OTHERS)
        return value

    def _lists(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> dict[str, list[_Span]]:
        """Stage 0. Names follow from the groups that build_optimizer makes; tensor() checks the match of masters."""
        saved = optimizer.get("fp32_groups", optimizer.get("param_groups", []))
        names = [list(group.names) for group in parameter_groups(self.shapes, by_layer=len(saved) > 2)]
        if "fp32_groups" in optimizer:
            groups, states = optimizer["fp32_groups"], optimizer.get("optimizer_state_dict")
            found, expected = [len(group) for group in groups], [len(group) for group in names]
            _require(found == expected, f"parameter groups of {found} masters where {expected} belong")
            self._rounded = weights
        else:
            # Frozen weights are in no group, so their names can't be told apart by counting.
            groups, states = [[weights[n] for n in group] for group in names], optimizer
            counts = [len(group["params"]) for group in optimizer.get("param_groups", [])]
            states = states if counts == [len(group) for group in names] else None
        moments = _moments(states)
        numbered = enumerate((n, m) for group in zip(names, groups, strict=True) for n, m in zip(*group, strict=True))
        spans = {name: [_whole(master, moments.get(number, {}))] for number, (name, master) in numbered}
        return {name: spans[name] for name in weights}


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
        if isinstance(error, UnpicklingError) or "_use_new_zipfile" in reason:  # torch advises to read it unsafely
            reason = "it is damaged, or holds more than tensors and plain data"
        advice = "restore it from a copy, or use another checkpoint of the run"
        raise CheckpointError(f"cannot read {path}: {reason}", advice) from error


def _slices(weights: dict[str, Tensor], trained: set[str], states: list[Any]) -> dict[str, list[_Span]]:
    """Stages 1 and 2: a parameter is on one rank, or on several one after the other. Frozen ones are in the model."""
    spans: dict[str, list[_Span]] = defaultdict(list)
    for state in states:
        flats = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        moments = _moments(state["base_optimizer_state"])
        for group, (flat, addresses) in enumerate(flats):
            holder = {"master": flat, **moments.get(group, {})}
            for name, address in addresses.items():
                spans[name].append(_Span((holder,), address.start, address.numel))
    frozen = {name: [_whole(weight, {"ema": weight})] for name, weight in weights.items() if name not in trained}
    return {name: frozen.get(name) or spans[name] for name in weights}


def _parts(models: list[Any], states: list[Any]) -> tuple[dict[str, torch.Size], dict[str, list[_Span]]]:
    """Stage 3: shapes, and a W-th of every parameter on each rank, rounded up."""
    shapes: dict[str, torch.Size] = dict(models[0]["frozen_param_shapes"])
    spans = {}
    for name in shapes:
        fragments = tuple(dict.fromkeys(("master", "ema"), model["frozen_param_fragments"][name]) for model in models)
        spans[name] = [_Span(fragments, 0, fragments[0]["master"].numel())]
    moments = [_moments(state.get("optimizer_state_dict")) for state in states]
    flats_by_group = zip(*(state["fp32_flat_groups"] for state in states), strict=True)
    for number, (group, flats) in enumerate(zip(models[0]["param_shapes"], flats_by_group, strict=True)):
        holders = tuple({"master": f, **m.get(number, {})} for f, m in zip(flats, moments, strict=True))
        start = 0
        for name, shape in group.items():
            numel = -(-shape.numel() // len(states))
            spans[name] = [_Span(holders, start, numel)]
            start += numel
        found = sorted({flat.numel() for flat in flats})
        _require(found == [start], f"{found} masters on a rank where {start} belong")
        shapes |= group
    return shapes, spans


def _check(shapes: dict[str, torch.Size], spans: dict[str, list[_Span]], trained: set[str], padding: int) -> None:
    for name, shape in shapes.items():
        found = sum(span.numel * len(span.holders) for span in spans[name])
        _require(shape.numel() <= found <= shape.numel() + padding, f"{found} values of {name} {tuple(shape)}")
        flats = [(span, *item) for span in spans[name] for holder in span.holders for item in holder.items()]
        for span, kind, flat in flats:
            if kind != "step":
                _require(0 <= span.start <= flat.numel() - span.numel, f"{name} past the end of its {kind}s")
                _require(flat.dtype == torch.float32 or name not in trained, f"{kind}s of {name} in {flat.dtype}")


def _moments(states: Any) -> dict[int, _Holder]:
    """What torch's AdamW remembers, by its number of the tensor."""
    return {} if states is None else states["state"]


def _whole(master: Tensor, moments: _Holder | None = None) -> _Span:
    return _Span(({"master": master, **(moments or {})},), 0, master.numel())


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
