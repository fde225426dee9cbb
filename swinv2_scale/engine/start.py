"""What the weights of a fresh run begin with: drawn numbers, or anyone's weights (``init_from``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.config.model import AttentionBackend
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import ClassificationConfig, CropRule
from swinv2_scale.engine import checkpoint, zero
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.run_dir import is_run_or_checkpoint
from swinv2_scale.errors import CheckpointError, ConfigError
from swinv2_scale.models import linear
from swinv2_scale.models.initialise import INITIAL_STD, initial_values
from swinv2_scale.models.ops import attend
from swinv2_scale.tasks.base import Task
from swinv2_scale.telemetry.console import log
from swinv2_scale.weights.api import BACKBONE, Loading, plan_loading
from swinv2_scale.weights.facts import Facts, crop_rule, native_fields
from swinv2_scale.weights.read import Weights, open_weights

_WINDOWS = ("model", "pretrained_window_sizes")
_OTHER = "use another checkpoint of the run, or the version that wrote it"


def open_source(path: Path, kind: str = "master") -> Weights:
    """Weights of any format, and of our runs and checkpoints (of any number of processes).

    Args:
        kind: of checkpoints, see consolidated().

    Raises:
        WeightsError: not weights of a Swin V2.
        CheckpointError: a run without a whole checkpoint.
    """
    if is_run_or_checkpoint(path):
        return consolidated(checkpoint.open_run_or_checkpoint(path), kind)
    return open_weights(path)


def consolidated(found: checkpoint.Checkpoint, kind: str = "master") -> Weights:
    """The float32 masters of a checkpoint, or their average (``ema``), as named tensors.

    Raises:
        CheckpointError: there is no average in it.
    """
    masters = SavedTensors(found)
    if kind not in masters.kinds:
        raise CheckpointError(f"{found.path} holds no average of the weights", "set optim.ema_decay in the run")
    names = {name.removeprefix(BACKBONE): name for name in masters.shapes}
    return Weights(
        where=str(found.path),
        style="native",
        facts=_facts(found),
        metas={ours: torch.empty(masters.shapes[name], device="meta") for ours, name in names.items()},
        tensor=lambda ours: masters.tensor(names[ours], kind),
        dropped={},
    )


def _facts(found: checkpoint.Checkpoint) -> Facts:
    """What a checkpoint says of its model beside the weights.

    Raises:
        CheckpointError: it isn't what ours say.
    """
    state = checkpoint.read_state(found)
    config, labels = state["config"], state.get("labels", [])
    model = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    crop = [config.get(f"task.{key}") for key in CropRule._fields]
    try:
        if not all(isinstance(name, str) for name in labels):
            raise ValueError("its class names are no texts")
        return Facts(
            native_fields({key: value for key, value in model.items() if "." not in key}),
            tuple(config["data.pixel_mean"]),
            tuple(config["data.pixel_std"]),
            tuple(labels) if len(labels) == model["num_classes"] else None,
            crop_rule(*crop) if config.get("task.name") == "classification" else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{found.path} doesn't say what its model is: {error!r}", _OTHER) from None


def settle_execution(loaded: LoadedConfig) -> LoadedConfig:
    """What ``auto`` means here, spelled out, so that a checkpoint says it and a resumed run what changed.

    Called by all ranks, which then compare their configurations.

    Raises:
        ConfigError: on every rank, if a backend or library that is asked for isn't there.
    """
    model = loaded.config.model

    def look() -> tuple[tuple[AttentionBackend, ...], linear.Library]:
        found: tuple[AttentionBackend, ...] = tuple(
            attend.choose() if name == "auto" else name for name in model.stage_backends
        )
        for name in set(found):
            attend.resolve(name, model.attention.max_score_bytes)
        return found, linear.resolve(model.linear)

    backends, library = dist.all_agree(look, "looking for what computes attention and Linears")
    if "auto" in model.stage_backends:
        backend = backends if isinstance(model.attention.backend, tuple) else backends[0]
        loaded = loaded.with_value(("model", "attention", "backend"), backend, "auto, on this machine")
    if model.linear == "auto":
        loaded = loaded.with_value(("model", "linear"), library, "auto, on this machine")
    return loaded


def settle(loaded: LoadedConfig, make_task: Callable[[RunConfig], Task]) -> tuple[LoadedConfig, Loading | None]:
    """Open ``init_from``, check it against the model, and spell out the pretrained windows that the run will have.

    Called by all ranks of a run that has no checkpoint yet.

    Raises:
        WeightsError: on every rank, if the weights don't fit.
    """
    config = loaded.config
    if config.init_from is None:
        return loaded.with_value(_WINDOWS, config.model.settled.pretrained_window_sizes, "image and window size"), None

    path, doing = Path(config.init_from).expanduser(), f"opening the weights {config.init_from}"
    # Which checkpoint of a run is the newest whole one can change while ranks look.
    step = dist.on_rank_zero(
        lambda: checkpoint.open_run_or_checkpoint(path).path if is_run_or_checkpoint(path) else None, doing
    )

    def plan() -> tuple[Loading, str]:
        with torch.device("meta"):
            model = make_task(config).build_model()
        shapes = {name: tuple(shape) for name, shape in zero.full_shapes(model).items()}
        weights = consolidated(checkpoint.read(step)) if step else open_weights(path)
        task = config.task
        wanted = (task.init_head, task.init_head_map) if isinstance(task, ClassificationConfig) else ("auto", None)
        loading = plan_loading(weights, shapes, config.model, head=wanted[0], head_map=wanted[1])
        return loading, loading.fingerprint()

    loading, fingerprint = dist.all_agree(plan, doing)
    others = dist.ranks_unlike_zero(fingerprint)
    if others:
        raise ConfigError(
            f"init_from {config.init_from} holds other weights for ranks {others} than for rank 0",
            "give a path under which every node sees the same file",
        )
    log().info("starting from %s", loading.report)
    if step and step != path:
        dist.on_rank_zero(lambda: _warn_if_unfinished(path, checkpoint.read(step)), doing)
    windows = loading.report.pretrained_window_sizes
    return loaded.with_value(_WINDOWS, windows, f"inherited from {config.init_from}"), loading


def _warn_if_unfinished(run: Path, newest: checkpoint.Checkpoint) -> None:
    """Said before the training starts: a stage that begins too early is found out after its days."""
    state = checkpoint.read_state(newest)
    total, patience = (state["config"].get(key) for key in ("optim.total_steps", "evaluation.patience"))
    is_stuck = patience is not None and state.get("validations_since_best", 0) >= patience
    if total is not None and newest.step < total and not is_stuck:
        log().warning(
            "%s isn't finished: its newest checkpoint is step %d of %d. To go on with it first, start its own command "
            "again; to take this step without a warning, name it: init_from=%s",
            *(run, newest.step, total, newest.path),
        )


def first_values(
    model: nn.Module, shapes: dict[str, torch.Size], config: RunConfig, loading: Loading | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 value) of every parameter of a fresh run, one at a time."""
    drawn = shapes if loading is None else {name: shapes[name] for name in loading.report.new}
    head_std = config.task.head_init_std if isinstance(config.task, ClassificationConfig) else INITIAL_STD
    for name, value in initial_values(model, drawn, config.seed):
        yield name, value * (head_std / INITIAL_STD) if name.endswith("head.weight") else value
    if loading is not None:
        for name, value in loading.values():
            yield name, value.float()


@torch.no_grad()
def begin_again(engine: Any, values: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Give a live engine its first values back; moments and averages are those of a fresh one. Called by all ranks.

    Args:
        values: (name, whole float32 value) of every parameter, each time it is called.
    """
    zero.assign(engine.module, values())
    if zero.adamw(engine) is not engine.optimizer:
        zero.assign_masters(engine, values())
    zero.forget_moments(engine)
