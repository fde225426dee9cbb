"""The composition root: from a configuration to a running job, and to its exit code."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.config.run import ClusterConfig, RunConfig
from swinv2_scale.data.ledger import Quarantined
from swinv2_scale.engine import (
    activation_checkpointing,
    announce,
    checkpoint,
    compilation,
    evaluate,
    random_states,
    restore,
    zero,
)
from swinv2_scale.engine.accounting import Accounting
from swinv2_scale.engine.amplitudes import AmplitudeMeter
from swinv2_scale.engine.deepspeed_config import read_back, translate
from swinv2_scale.engine.deepspeed_import import deepspeed, deepspeed_logger
from swinv2_scale.engine.doctor.storage import check_before_training, check_swap_space
from swinv2_scale.engine.inputs import Inputs, open_inputs
from swinv2_scale.engine.loop import Loop
from swinv2_scale.engine.optim import build_optimizer
from swinv2_scale.engine.output import Output
from swinv2_scale.engine.preemption import StopRequest, end_of_slurm_job
from swinv2_scale.engine.resume import Resume, facts_of, find_checkpoint, plain, read_state, versions
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.start import begin_again, first_values, settle, settle_execution
from swinv2_scale.engine.step import TrainState
from swinv2_scale.engine.swap_files import SwapFolder
from swinv2_scale.engine.watchdog import Watchdog
from swinv2_scale.errors import CheckpointError, ClusterError, ConfigError, ExitCode, ScaleError
from swinv2_scale.launchers import place as launchers
from swinv2_scale.launchers.place import Place
from swinv2_scale.launchers.processes import Process, hostfile_of, own_launcher
from swinv2_scale.plan.batch import accumulation_steps
from swinv2_scale.tasks.base import Task
from swinv2_scale.tasks.classification import ClassificationTask
from swinv2_scale.tasks.simmim import SimMIMTask
from swinv2_scale.telemetry.console import ProgressLine, log, log_to_file, start_logging
from swinv2_scale.weights.api import Loading

TASKS: dict[str, type[SimMIMTask] | type[ClassificationTask]] = {
    "simmim": SimMIMTask,
    "classification": ClassificationTask,
}


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
    cluster, directory = loaded.config.cluster, RunDirectory(options.run_dir)
    place, launcher = launchers.adopt(), own_launcher()
    start_logging(place.rank)
    stop_request = StopRequest(
        launcher, directory.stop if place.rank == 0 else None, end_of_slurm_job(), cluster.grace_s
    )

    def record_end(code: int, why: str = "") -> None:
        if place.rank == 0:
            directory.record_end(code, why)

    watchdog = Watchdog(cluster, directory.log(place.rank), record_end)
    try:
        check_cluster(cluster, place, launcher)
        dist.allow_open_files()
        dist.start(cluster.timeout_s)
        with dist.peers_may_be_lost("training", watchdog.who_is_missing):
            watchdog.start()
            loaded = settle_execution(loaded)
            check_ranks_agree(loaded.config, options)
            code = _run(loaded, options, directory, stop_request, watchdog)
            dist.barrier()
        record_end(code, (stop_request.reason or "") if code == ExitCode.STOPPED else "")
        return code
    except BaseException as error:
        log().debug("ended by:", exc_info=True)  # into this rank's log file; the console gets one error, not W
        if isinstance(error, ScaleError):
            record_end(error.exit_code, error.message)
        else:
            record_end(1, repr(error))
        raise
    finally:
        watchdog.stop()
        directory.close()
        dist.stop()


def build_engine(config: RunConfig, task: Task, loading: Loading | None = None, will_load: bool = False) -> Any:
    """The DeepSpeed engine around a task's freshly initialised model, checked against the configuration.

    Args:
        loading: weights to begin with; None draws all of them.
        will_load: a checkpoint comes next: leave the values undefined.

    Raises:
        OutputError: on every rank, if what is to be offloaded to files can't be.
    """
    started = time.perf_counter()
    ds_config = translate(config, dist.world_size())
    dist.all_agree(lambda: compilation.check(config), "looking for a compiler")
    swap = _claim_swap_folder(config) if config.engine.offload.uses_nvme else None
    model = zero.build(task.build_model, ds_config)
    shapes = zero.full_shapes(model)
    if not will_load:
        zero.assign(model, first_values(model, shapes, config, loading))
    compilation.apply(model, config)
    activation_checkpointing.apply(model, config.engine.activation_checkpointing)
    with compilation.left_out(config):
        optimizer = build_optimizer(model, shapes, config.optim)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    # Stage 0 in bf16 takes an update with zero gradients to allocate its states; it isn't one of ours.
    zero.forget_moments(engine)
    if swap:
        swap.remove_with(engine)
    if config.engine.precision == "bf16" and not will_load:
        zero.assign_masters(engine, first_values(model, shapes, config, loading))
    read_back(engine, config, dist.world_size())
    log().info(
        "model: %s, %s parameters, ZeRO stage %d, %s, attention %s (%.1f s)",
        config.model.variant,
        f"{sum(shape.numel() for shape in shapes.values()):,}",
        config.engine.zero_stage,
        config.engine.precision,
        "/".join(config.model.stage_backends),
        time.perf_counter() - started,
    )
    return engine


def _claim_swap_folder(config: RunConfig) -> SwapFolder:
    """Room for what is offloaded to files, known to be enough once what killed jobs left there is gone."""
    folder = dist.all_agree(lambda: SwapFolder(config.engine.offload), "preparing engine.offload.nvme_dir")
    dist.all_agree(lambda: check_swap_space(config), "looking at the disk of engine.offload.nvme_dir")
    return folder


def _run(
    loaded: LoadedConfig, options: JobOptions, directory: RunDirectory, stop_request: StopRequest, watchdog: Watchdog
) -> ExitCode:
    config = loaded.config
    num_micro_batches = accumulation_steps(config, dist.world_size())
    directory.life = dist.on_rank_zero(directory.open, "opening the run directory")
    dist.all_agree(lambda: log_to_file(directory.log(dist.rank()), deepspeed_logger), "opening the log")
    announce.beginning(config, directory, num_micro_batches)
    watchdog.enter("opening the data")
    inputs = open_inputs(config)
    watchdog.enter("looking for a checkpoint")
    found, state, loaded = find_checkpoint(options.resume, directory, loaded, inputs.train)
    task_type = TASKS[config.task.name]
    loaded, loading = (loaded, None) if found else settle(loaded, task_type)
    config, inputs = loaded.config, replace(inputs, config=loaded.config)
    last_step = min(options.last_step or config.optim.total_steps, config.optim.total_steps)
    if state.step >= last_step or state.is_over(config):
        announce.nothing_to_do(state, config, directory)
        return ExitCode.DONE

    dist.on_rank_zero(lambda: check_before_training(config, directory.checkpoints), "looking at the disk")
    task: Task = task_type(config)
    task.labels = inputs.labels
    watchdog.enter("building the model")
    engine = build_engine(config, task, loading, will_load=found is not None)
    if found:
        watchdog.enter("reading the checkpoint")
        restore.load(engine, found, config.data.global_batch_size)
    output = dist.all_agree(
        lambda: Output(loaded, directory, state, found) if dist.rank() == 0 else None, "opening the run's files"
    )
    saver = Saver(engine, directory.checkpoints, directory.staging, config.checkpoint)

    def first() -> Iterator[tuple[str, torch.Tensor]]:
        return first_values(engine.module, zero.full_shapes(engine.module), config, loading)

    progress = ProgressLine(config.optim.total_steps, config.logging.console_every_steps, dist.rank() == 0)
    loop = Loop(
        engine=engine,
        task=task,
        config=config,
        state=state,
        accounting=Accounting(config, inputs.order),
        open_batches=lambda state: inputs.training(task, state.samples_seen, last_step - state.step),
        num_micro_batches=num_micro_batches,
        between_steps=_BetweenSteps(engine, task, inputs, saver, output, watchdog, None if found else first),
        progress=progress,
        stop_request=stop_request,
        watchdog=watchdog,
        last_step=last_step,
        amplitudes=AmplitudeMeter(engine.module),
    )
    if found:
        dist.all_agree(lambda: random_states.restore(found, dist.rank(), dist.world_size()), f"loading {found.path}")
    try:
        code = loop.run()
    finally:
        saver.close()
        progress.close()
        if output:
            with contextlib.suppress(OSError):  # every row was flushed when it was written
                output.close()
    announce.end(code, loop.state, loop.validation, config, directory)
    return code


@dataclass(frozen=True)
class _BetweenSteps:
    """What the loop does besides training; see engine/loop.py for the contract."""

    engine: Any
    task: Task
    inputs: Inputs
    saver: Saver
    output: Output | None
    watchdog: Watchdog
    first: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None  # values, of a run that began in this life

    @property
    def has_validation(self) -> bool:
        return self.inputs.validation is not None

    def begin_save(self, state: TrainState, validation: evaluate.Validation | None) -> None:
        self.watchdog.enter("saving a checkpoint", state.step)
        lists = dist.all_agree(lambda: self.output.sync() if self.output else {}, "writing the metrics")
        facts = facts_of(self.inputs.config, self.inputs.train, self.inputs.labels)
        self.saver.begin(state.step, {**state.to_json(), **facts}, validation, lists)

    def rewind(self) -> TrainState:
        self.watchdog.enter("going back to the last checkpoint")
        found = checkpoint.newest_verified(self.saver.folder)
        if found:
            state, _ = dist.on_rank_zero(lambda: read_state(found), f"reading {found.path}")
            restore.load(self.engine, found, self.inputs.config.data.global_batch_size)
        elif self.first:
            state = TrainState()
            begin_again(self.engine, self.first)
        else:
            raise CheckpointError(f"{self.saver.folder} holds no checkpoint any more", "start again")
        dist.all_agree(lambda: self.output.rewind(state.step) if self.output else None, "rewinding the metrics")
        return state

    def validate(self, step: int, with_picture: bool) -> evaluate.Validation:
        metric = self.inputs.config.evaluation.metric
        with contextlib.closing(self.inputs.held_back(self.task)) as held_back:
            batches = self.watchdog.each(held_back, "validating", step)
            found, lost = evaluate.evaluate(self.engine, self.task, batches, metric)
        dist.all_agree(lambda: self._list(lost, step, "validation"), "writing the quarantine list")
        self.inputs.check_held_back(lost)
        if with_picture:
            dist.all_agree(lambda: self._draw_summary(found, step), "writing the validation's picture")
        return found

    def _draw_summary(self, found: evaluate.Validation, step: int) -> None:
        image = self.task.summary(found.sums, f"step {step}: {found}") if self.output else None
        if self.output and image:
            self.output.panel(image, step, "validation")

    def draw_panel(self, step: int) -> None:
        self.watchdog.enter("drawing the panel", step)
        batch = dist.all_agree(lambda: self.inputs.panel_batch(self.task), "reading the panel's images")
        image = evaluate.panel(self.engine, self.task, batch, f"step {step}")
        dist.all_agree(lambda: self.output.panel(image, step) if self.output else None, "writing the panel")

    def write_row(self, row: dict[str, Any]) -> None:
        if self.output:
            self.output.row(row)

    def write_anomaly(self, row: dict[str, Any]) -> None:
        if self.output:
            names = dict(zip(self.inputs.train.shard_ids, self.inputs.train.names, strict=True))
            for batch in row.get("micro_batches", ()):
                ids = (key.partition("/") for key in batch["keys"])
                batch["keys"] = [{"shard": names[shard], "key": key} for shard, _, key in ids]
            self.output.anomaly(row)

    def list_quarantined(self, lost: list[Quarantined], step: int) -> None:
        self._list(lost, step, "training")

    def _list(self, lost: list[Quarantined], step: int, use: str) -> None:
        if self.output and lost and self.output.quarantine(lost, step, use):
            done = "replaced" if use == "training" else "left out"
            log().warning("step %d: %d damaged %s samples %s, one: %s", step, len(lost), use, done, lost[0].cause)


def check_cluster(cluster: ClusterConfig, place: Place, launcher: list[Process]) -> None:
    """Before the processes join: a wrong hostfile makes DeepSpeed train on one node, without an error.

    Raises:
        ClusterError: the launcher has started something else than the configuration, or its own options, ask for.
    """
    hostfile = hostfile_of(launcher)
    problem = None
    if hostfile is not None and not hostfile.exists():
        problem = f"there is no hostfile {hostfile}"
    elif cluster.world_size not in (None, place.world_size):
        problem = f"cluster.world_size is {cluster.world_size}, the launcher started {place.world_size} processes"
    elif cluster.num_nodes not in (None, place.num_nodes):
        problem = f"cluster.num_nodes is {cluster.num_nodes}, the launcher started processes on {place.num_nodes}"
    if problem:
        raise ClusterError(problem, "check the hostfile's path and contents (DeepSpeed goes on without it), or the key")


def check_ranks_agree(config: RunConfig, options: object) -> None:
    """Every rank reads its own copy of the configuration; a stale one would train a part of the weights differently."""
    mine = json.dumps([plain(config), repr(options), versions()])
    others = dist.ranks_unlike_zero(mine)
    if others:
        raise ConfigError(
            f"ranks {others} were started with another configuration, options or versions than rank 0",
            "make every node see the same files, environment and command line",
        )
