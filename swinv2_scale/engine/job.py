"""The composition root: from a configuration to a running job, and to its exit code."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig, flatten, to_yaml
from swinv2_scale.config.rules import changes
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch, evaluation_batches, training_batches
from swinv2_scale.data.manifest import ShardSet, read_shard_set
from swinv2_scale.data.order import Order
from swinv2_scale.data.sources import EMBEDDED_PREFIX, embedded_shards
from swinv2_scale.engine import activation_checkpointing, checkpoint, evaluate, zero
from swinv2_scale.engine.deepspeed_config import accumulation_steps, read_back, translate
from swinv2_scale.engine.deepspeed_import import deepspeed, deepspeed_logger
from swinv2_scale.engine.loop import Loop
from swinv2_scale.engine.optim import build_optimizer
from swinv2_scale.engine.preemption import StopRequest
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.step import TrainState
from swinv2_scale.errors import CheckpointError, ClusterError, ConfigError, DataError, ExitCode, OutputError
from swinv2_scale.models.initialise import initial_values
from swinv2_scale.tasks.base import Task
from swinv2_scale.tasks.simmim import SimMIMTask
from swinv2_scale.telemetry.console import ProgressLine, log, log_to_file, start_logging
from swinv2_scale.telemetry.metrics import MetricsFile
from swinv2_scale.telemetry.tensorboard import TensorBoard

Resume = Literal["auto", "required", "never"]
_TASKS = {"simmim": SimMIMTask}


@dataclass(frozen=True)
class JobOptions:
    """What the command line says beside the configuration."""

    run_dir: Path
    last_step: int | None = None
    resume: Resume = "auto"


def run_job(loaded: LoadedConfig, options: JobOptions) -> ExitCode:
    """Run one stage from wherever it stands, until it is done or stopped.

    Raises:
        ScaleError: on every rank the same one.
    """
    start_logging(dist.rank())
    stop_request = StopRequest()
    config = loaded.config
    _check_cluster(config)
    dist.start(config.cluster.timeout_s)
    directory = RunDirectory(options.run_dir)
    try:
        with dist.peers_may_be_lost("training"):
            code = _run(loaded, options, directory, stop_request)
            dist.barrier()
            return code
    finally:
        directory.close()
        dist.stop()


def _run(loaded: LoadedConfig, options: JobOptions, directory: RunDirectory, stop_request: StopRequest) -> ExitCode:
    config = loaded.config
    num_micro_batches = accumulation_steps(config, dist.world_size())
    dist.all_agree(lambda: directory.open() if dist.rank() == 0 else None, "opening the run directory")
    dist.all_agree(lambda: log_to_file(directory.log(dist.rank()), deepspeed_logger), "opening the log")
    _greet(config, directory, num_micro_batches)
    train, validation = _open_shards(config)
    found = _find_checkpoint(options, directory, loaded, train)
    state = checkpoint.read_state(found)[0] if found else TrainState()
    last_step = min(options.last_step or config.optim.total_steps, config.optim.total_steps)
    if state.step >= last_step:
        _say_finished(state, config, directory)
        return ExitCode.DONE

    task: Task = _TASKS[config.task.name](config)
    engine = build_engine(config, task)
    if found:
        checkpoint.load(engine, found)
    writer = dist.all_agree(
        lambda: _Output(loaded, directory, state, train) if dist.rank() == 0 else None, "opening the run's files"
    )
    progress = ProgressLine(config.optim.total_steps, config.logging.console_every_steps, dist.rank() == 0)

    def save(state: TrainState) -> None:
        started = time.perf_counter()
        if writer is not None:
            writer.metrics.sync()
        facts = _facts(config, train)
        path = checkpoint.publish(engine, directory.checkpoints, state, facts, config.checkpoint.keep)
        log().info("step %d: checkpoint %s (%.1f s)", state.step, path, time.perf_counter() - started)

    def held_back(num_samples: int, spread: bool) -> Iterator[Batch]:
        assert validation is not None
        return evaluation_batches(
            validation,
            Order(validation.sizes, config.seed, shuffle=False, shuffle_shards=1),
            task.evaluation_sample,
            num_samples=min(num_samples, validation.num_samples),
            micro_batch_size=config.data.micro_batch_size if spread else num_samples,
            rank=dist.rank() if spread else 0,
            world_size=dist.world_size() if spread else 1,
        )

    def draw_panel(step: int) -> None:
        batch = dist.all_agree(lambda: next(held_back(panel_images, spread=False)), "reading the panel's images")
        title = f"step {step}, {config.task.mask_ratio:.0%} hidden in units of {config.task.mask_patch_size} px"
        image = evaluate.panel(engine, task, batch, title)
        dist.all_agree(lambda: writer.panel(image, step) if writer else None, "writing the panel")

    panel_images = min(config.logging.panel_images, validation.num_samples if validation else 0)
    loop = Loop(
        engine=engine,
        task=task,
        config=config,
        state=state,
        batches=_training_batches(config, task, train, state, last_step),
        num_micro_batches=num_micro_batches,
        validate=(lambda: evaluate.validation_loss(engine, task, held_back(config.evaluation.samples, spread=True)))
        if validation
        else None,
        draw_panel=draw_panel if validation else None,
        save=save,
        write_row=writer.row if writer else lambda row: None,
        progress=progress,
        stop_request=stop_request,
        last_step=last_step,
    )
    try:
        code = loop.run()
    finally:
        progress.close()
        if writer is not None:
            writer.close()
    _say_result(code, loop.state, config, directory)
    return code


def build_engine(config: RunConfig, task: Task) -> Any:
    """The DeepSpeed engine around a task's freshly initialised model, checked against the configuration."""
    started = time.perf_counter()
    ds_config = translate(config, dist.world_size())
    model = zero.build(task.build_model, ds_config)
    shapes = zero.full_shapes(model)
    zero.assign(model, initial_values(model, shapes, config.seed))
    activation_checkpointing.apply(model, config.engine.activation_checkpointing)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, shapes, config.optim), config=ds_config
    )
    if config.engine.precision == "bf16":
        zero.assign_masters(engine, initial_values(model, shapes, config.seed))
    read_back(engine, config, dist.world_size())
    count = sum(shape.numel() for shape in shapes.values())
    log().info(
        "model: %s, %s parameters, ZeRO stage %d, %s, attention %s (%.1f s)",
        config.model.variant,
        f"{count:,}",
        config.engine.zero_stage,
        config.engine.precision,
        "/".join(config.model.stage_backends),
        time.perf_counter() - started,
    )
    return engine


class _Output:
    """What rank 0 writes while training."""

    def __init__(self, loaded: LoadedConfig, directory: RunDirectory, state: TrainState, train: ShardSet) -> None:
        checkpoint.remove_unpublished(directory.checkpoints)
        directory.write_config(to_yaml(loaded))
        directory.record_life(from_step=state.step, world_size=dist.world_size(), **_versions())
        self._panels = directory.panels
        self.metrics = MetricsFile(directory.metrics, state.step)
        self._board = TensorBoard(directory.tensorboard, state.step) if loaded.config.logging.tensorboard else None

    def row(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        if self._board:
            self._board.row(row)

    def panel(self, image: Any, step: int) -> None:
        image.save(self._panels / f"step-{step:08d}.png")
        if self._board:
            self._board.image("panel", image, step)

    def close(self) -> None:
        self.metrics.close()
        if self._board:
            self._board.close()


def _training_batches(
    config: RunConfig, task: Task, train: ShardSet, state: TrainState, last_step: int
) -> Iterator[Batch]:
    data = config.data
    return training_batches(
        train,
        Order(train.sizes, config.seed, data.shuffle, data.shuffle_shards),
        task.training_sample,
        start_step=state.step,
        end_step=last_step,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=data.num_workers,
        prefetch_batches=data.prefetch_batches,
    )


def _check_cluster(config: RunConfig) -> None:
    """Before the processes join: a wrong hostfile makes DeepSpeed train on one node, without an error."""
    asked, found = config.cluster.world_size, dist.world_size()
    nodes = found // dist.local_world_size()
    problem = None
    if asked is not None and asked != found:
        problem = f"cluster.world_size is {asked}, the launcher started {found} processes"
    elif config.cluster.num_nodes is not None and config.cluster.num_nodes != nodes:
        problem = f"cluster.num_nodes is {config.cluster.num_nodes}, the launcher started processes on {nodes}"
    if problem:
        raise ClusterError(problem, "check the hostfile's path and contents (DeepSpeed goes on without it), or the key")


def _open_shards(config: RunConfig) -> tuple[ShardSet, ShardSet | None]:
    train = _open_shard_set(config, config.data.train, "training")
    if train.num_samples < config.data.global_batch_size:
        raise DataError(
            f"data.train has {train.num_samples} samples, fewer than data.global_batch_size "
            f"{config.data.global_batch_size}",
            "add shards or make the global batch smaller",
        )
    validation = None
    if config.data.validation is not None:
        validation = _open_shard_set(config, config.data.validation, "validation")
        both = {p.resolve() for p in train.paths} & {p.resolve() for p in validation.paths}
        if both:
            raise DataError(f"{min(both)} is in data.train and in data.validation", "hold some shards back")
    return train, validation


def _open_shard_set(config: RunConfig, pattern: str | tuple[str, ...], use: str) -> ShardSet:
    """Write embedded shards where needed, then read and check manifests: once a node, the rest believe it."""
    if isinstance(pattern, str) and pattern.startswith(EMBEDDED_PREFIX):
        name = pattern
        pattern = dist.on_rank_zero(lambda: embedded_shards(name, Path(config.data.shards_dir)), f"writing {name}")
    wanted = pattern

    def read() -> ShardSet:
        shards = read_shard_set(wanted)
        if dist.local_rank() == 0:
            shards.check_files()
        return shards

    shards = dist.all_agree(read, f"opening the {use} shards")
    if len(set(dist.gather(shards.digest))) > 1:
        raise DataError(f"ranks see different {use} shards", "every node must see the same files")
    log().info(
        "%s data: %s samples in %d shards, %.1f MiB (%s)",
        use,
        f"{shards.num_samples:,}",
        len(shards.paths),
        shards.num_bytes / 2**20,
        shards.paths[0].parent,
    )
    return shards


def _find_checkpoint(
    options: JobOptions, directory: RunDirectory, loaded: LoadedConfig, train: ShardSet
) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, after comparing its run with this one."""
    found = checkpoint.newest_verified(directory.checkpoints)
    if found is None:
        if options.resume == "required":
            raise CheckpointError(
                f"--resume required, but {directory.checkpoints} holds no checkpoint",
                "correct --run-dir, or start a new run with --resume auto",
            )
        return None
    if options.resume == "never":
        raise OutputError(
            f"--resume never, but {directory.root} holds a run at step {found.step}",
            "choose another --run-dir for a new run; nothing here is overwritten",
        )
    _, facts = checkpoint.read_state(found)
    _compare_runs(facts, loaded.config, train, directory)
    log().info("resuming from %s: step %d, every file verified", found.path, found.step)
    return found


def _compare_runs(facts: dict[str, Any], config: RunConfig, train: ShardSet, directory: RunDirectory) -> None:
    differing = changes(facts["config"], _plain_config(config))
    fixed = [change for change in differing if change.policy == "fixed"]
    if fixed:
        lines = "".join(f"\n  - {change}" for change in differing)
        raise ConfigError(
            f"{directory.root} holds a run of another configuration:{lines}",
            "take those values back to resume it, or choose another --run-dir for a new run",
        )
    for change in differing:
        log().info("changed since the checkpoint: %s", change)
    if facts["train_digest"] != train.digest:
        raise DataError(
            f"the training shards are not the ones that {directory.root} was trained on (their manifests differ)",
            "point data.train to the same shards, or choose another --run-dir for a new run",
        )


def _facts(config: RunConfig, train: ShardSet) -> dict[str, Any]:
    return {"config": _plain_config(config), "train_digest": train.digest, "versions": _versions()}


def _plain_config(config: RunConfig) -> dict[str, Any]:
    """Flat, as JSON gives it back: lists for tuples."""
    flat = {".".join(key): value for key, value in flatten(config).items()}
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_listed(flat)))
    return plain


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value


def _versions() -> dict[str, str]:
    names = ("swinv2-scale", "torch", "deepspeed", "webdataset", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _greet(config: RunConfig, directory: RunDirectory, num_micro_batches: int) -> None:
    data = config.data
    log().info("run directory: %s", directory.root)
    log().info(
        "%d %s on %s; batch %d = %d processes x %d samples x %d accumulated",
        dist.world_size(),
        "process" if dist.world_size() == 1 else "processes",
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads each)",
        data.global_batch_size,
        dist.world_size(),
        data.micro_batch_size,
        num_micro_batches,
    )


def _say_finished(state: TrainState, config: RunConfig, directory: RunDirectory) -> None:
    if state.step >= config.optim.total_steps:
        log().info(
            "this run is finished: step %d of %d. Look at %s and %s; for a new run choose another --run-dir "
            "(or delete %s)",
            state.step,
            config.optim.total_steps,
            directory.panels,
            directory.metrics,
            directory.root,
        )
    else:
        log().info("step %d is reached already; raise --steps to go on", state.step)


def _say_result(code: ExitCode, state: TrainState, config: RunConfig, directory: RunDirectory) -> None:
    if code == ExitCode.STOPPED:
        log().info("stopped at step %d with a checkpoint; the same command goes on (exit code %d)", state.step, code)
    elif state.step == config.optim.total_steps:
        log().info(
            "done: %d steps. Pictures: %s  curves: tensorboard --logdir %s",
            state.step,
            directory.panels,
            directory.root,
        )
    else:
        log().info("step %d reached, checkpoint written; the same command goes on", state.step)
