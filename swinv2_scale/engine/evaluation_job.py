"""An evaluation from configuration and weights to numbers: any number of ranks, no optimizer, the whole data set."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.config.run import RunConfig, ShardPattern
from swinv2_scale.config.tasks import ClassificationConfig
from swinv2_scale.data.loader import Batch
from swinv2_scale.durable import write_whole
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.evaluate import Validation, evaluate
from swinv2_scale.engine.inputs import Inputs, open_held_back
from swinv2_scale.engine.job import check_cluster, check_ranks_agree
from swinv2_scale.engine.run_dir import is_run_or_checkpoint
from swinv2_scale.engine.start import consolidated
from swinv2_scale.errors import CheckpointError, ConfigError
from swinv2_scale.launchers import place as launchers
from swinv2_scale.launchers.processes import own_launcher
from swinv2_scale.tasks.classification import ClassificationTask
from swinv2_scale.telemetry.console import log, start_logging
from swinv2_scale.weights.api import Loading, plan_loading, require_head
from swinv2_scale.weights.read import open_weights

#: (samples done, samples in all)
ShowProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """What the command line says beside the configuration.

    Args:
        weights: a run, a checkpoint, or a file of weights.
        output: the folder for the results.
        best: of a run, the checkpoint that its own validations found best; else the newest.
        average: the moving average of the weights.
    """

    weights: Path
    output: Path
    best: bool = False
    average: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What was found, on rank 0 of the evaluation."""

    report: dict[str, Any]
    json: Path
    picture: Path | None


def run_evaluation(loaded: LoadedConfig, options: EvaluationOptions, show: ShowProgress) -> Evaluation | None:
    """Evaluate, and write ``NAME.json`` and ``NAME.png`` into the output folder; the result on rank 0.

    Every process holds the whole model, in ``engine.precision``.

    Raises:
        ScaleError: on every rank the same one.
    """
    task, pattern = loaded.config.task, loaded.config.data.validation
    if not isinstance(task, ClassificationConfig):
        raise ConfigError(
            f"{loaded.path} is a stage of {task.name}: there are no classes to be right or wrong about",
            "give the configuration of a fine-tuning; swinv2-scale probe shows what a pre-training's features know",
        )
    if pattern is None:
        raise ConfigError(f"{loaded.path} has no data.validation", "name the shards: data.validation='val/*.tar'")
    # Training looks at a part of them, now and then.
    is_part = loaded.origin(("evaluation", "samples")).startswith("command line")
    loaded = loaded if is_part else loaded.with_value(("evaluation", "samples"), None, "an evaluation takes all")
    cluster, place = loaded.config.cluster, launchers.adopt()
    start_logging(place.rank)
    # An evaluation may have as many processes as it likes.
    check_cluster(cluster.model_copy(update={"world_size": None, "num_nodes": None}), place, own_launcher())
    try:
        dist.allow_open_files()
        dist.start(cluster.timeout_s)
        with dist.peers_may_be_lost("evaluating", lambda: "it ended, or doesn't answer"):
            check_ranks_agree(loaded.config, options)
            found = _evaluate(loaded, pattern, options, show)
            dist.barrier()
        return found
    finally:
        dist.stop()


def _evaluate(
    loaded: LoadedConfig, pattern: ShardPattern, options: EvaluationOptions, show: ShowProgress
) -> Evaluation | None:
    inputs = open_held_back(loaded.config, pattern)
    name, loading = _plan(loaded.config, options)
    windows = loading.report.pretrained_window_sizes
    config = loaded.with_value(("model", "pretrained_window_sizes"), windows, "the weights'").config
    log().info("weights: %s", loading.report)
    task = ClassificationTask(config)
    task.labels = _labels(inputs, loading)
    model = _build(config, task, loading)
    with contextlib.closing(inputs.held_back(task)) as batches, _autocast(config):
        found, lost = evaluate(model, task, _watched(batches, inputs, show), "loss")
    inputs.check_held_back(lost)
    report = _report(config, task, inputs, loading, found, len(lost))

    def write() -> Evaluation | None:
        if dist.rank() > 0:
            return None
        options.output.mkdir(parents=True, exist_ok=True)
        size, window = (_text(length) for length in (config.model.image_size, config.model.window_size))
        path = options.output / f"{name}-{size}px-window{window}.json"
        write_whole(path, json.dumps(report, indent=1, ensure_ascii=False))
        image = task.summary(found.sums, f"{name}: {found}")
        if image:
            image.save(path.with_suffix(".png"))
        return Evaluation(report, path, path.with_suffix(".png") if image else None)

    return dist.all_agree(write, "writing the results")


def _plan(config: RunConfig, options: EvaluationOptions) -> tuple[str, Loading]:
    """A name for the weights, and what becomes of each of them; every rank has read the same bits."""
    path, doing = options.weights.expanduser(), f"opening the weights {options.weights}"
    is_ours = dist.on_rank_zero(lambda: is_run_or_checkpoint(path), doing)
    if not is_ours and (options.best or options.average):
        option = "--best" if options.best else "--average"
        raise ConfigError(f"{option} is for runs and checkpoints; {path} is none", f"leave {option} out").shared()
    # Which checkpoint of a run is the newest can change while ranks look.
    step = dist.on_rank_zero(lambda: _checkpoint(path, options.best).path if is_ours else None, doing)

    def plan() -> tuple[Loading, str]:
        kind = "ema" if options.average else "master"
        weights = consolidated(checkpoint.read(step), kind) if step else open_weights(path)
        require_head(weights, config.model.num_classes)
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in ClassificationTask(config).build_model().named_parameters()}
        loading = plan_loading(weights, shapes, config.model, head="keep")
        return loading, loading.fingerprint()

    loading, fingerprint = dist.all_agree(plan, doing)
    others = dist.ranks_unlike_zero(fingerprint)
    if others:
        raise ConfigError(f"{path} holds other weights for ranks {others} than for rank 0", "show every node the same")
    name = step.name if step else path.stem
    return f"{name}-average" if options.average else name, loading


def _checkpoint(path: Path, best: bool) -> checkpoint.Checkpoint:
    """
    Raises:
        CheckpointError: there is none, a damaged one, or none that was ever judged.
    """
    if not best:
        return checkpoint.open_run_or_checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    judged = [(found.score, -found.step, found) for found in checkpoint.find(folder) if found.score is not None]
    if not judged:
        raise CheckpointError(
            f"{path} holds no checkpoint that was saved at a validation",
            "set checkpoint.keep_best and evaluation.every_steps in the run, or leave out --best for the newest",
        )
    found = min(judged, key=lambda item: item[:2])[-1]
    checkpoint.verify(found)
    return found


def _labels(inputs: Inputs, loading: Loading) -> tuple[str, ...]:
    """What classes are called; a warning where weights and data disagree."""
    theirs, known = loading.report.facts.labels or (), inputs.labels
    if theirs and known and theirs != known:
        number = next((i for i, names in enumerate(zip(theirs, known, strict=False)) if names[0] != names[1]), 0)
        log().warning(
            "class %d is %r for the weights and %r in data.validation; labels are compared by number",
            number,
            theirs[number],
            known[number],
        )
    return known or theirs


@torch.no_grad()
def _build(config: RunConfig, task: ClassificationTask, loading: Loading) -> nn.Module:
    """The model on this process's device, never in more memory than it takes in ``engine.precision``."""
    with torch.device("meta"):
        model = task.build_model()
    assert not list(model.buffers()), "nothing would fill them"
    model = model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    model = model.to_empty(device=dist.device())
    parameters = dict(model.named_parameters())
    for name, value in loading.values():
        parameters.pop(name).copy_(value)
    assert not parameters, f"{list(parameters)} have no values"
    return model


def _autocast(config: RunConfig) -> torch.autocast:
    """As the training's engine computes."""
    return torch.autocast(dist.device().type, torch.bfloat16, enabled=config.engine.precision == "bf16_autocast")


def _watched(batches: Iterator[Batch], inputs: Inputs, show: ShowProgress) -> Iterator[Batch]:
    """The batches; on rank 0 each is shown when it is done with, and every tenth of the way is a line of the log."""
    stride, total = inputs.config.data.micro_batch_size * dist.world_size(), inputs.num_held_back
    done = 0
    for batch in batches:
        yield batch
        before, done = done, min(done + stride, total)
        if dist.rank() == 0:
            show(done, total)
        if 10 * before // total < 10 * done // total and not sys.stderr.isatty():
            log().info("%s of %s images", f"{done:,}", f"{total:,}")


def _report(
    config: RunConfig, task: ClassificationTask, inputs: Inputs, loading: Loading, found: Validation, num_lost: int
) -> dict[str, Any]:
    """The same for any number of processes: nothing of the machine, no time."""
    assert inputs.validation is not None
    model = config.model
    counts, rights = (values.tolist() for values in task.per_class(found.sums))
    names = task.labels or tuple(f"class {label}" for label in range(model.num_classes))
    return {
        "metrics": found.metrics,
        "samples": inputs.num_held_back - num_lost,
        "damaged": num_lost,
        "weights": loading.report.where,
        "data": config.data.validation,
        "data_digest": inputs.validation.digest,
        "variant": model.variant,
        "image_size": model.image_size,
        "window_size": model.window_size,
        "pretrained_window_sizes": model.pretrained_window_sizes,
        "precision": config.engine.precision,
        "crop": task.task.crop._asdict(),
        "per_class": [
            {"label": label, "name": name, "samples": int(count), "right": int(right)}
            for label, (name, count, right) in enumerate(zip(names, counts, rights, strict=True))
        ],
    }


def _text(size: int | tuple[int, int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))
