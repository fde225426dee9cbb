"""What a job says of itself, at its beginning and its end."""

from __future__ import annotations

import torch

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine.evaluate import Validation
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.step import TrainState
from swinv2_scale.errors import ExitCode
from swinv2_scale.telemetry.console import log


def beginning(config: RunConfig, directory: RunDirectory, num_micro_batches: int) -> None:
    world_size = dist.world_size()
    on_cpu = f"CPU, {torch.get_num_threads()} thread(s) each"
    log().info("run directory: %s", directory.root)
    log().info(
        "%d %s (%s); batch of %d = %d processes x %d images x %d accumulated",
        world_size,
        "process" if world_size == 1 else "processes",
        torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        config.data.global_batch_size,
        world_size,
        config.data.micro_batch_size,
        num_micro_batches,
    )


def nothing_to_do(state: TrainState, config: RunConfig, directory: RunDirectory) -> None:
    if not state.is_over(config):
        log().info("step %d is reached already; raise --steps to go on", state.step)
        return
    log().info(
        "this run is finished: %d of %d steps%s", state.step, config.optim.total_steps, _why_early(state, config)
    )
    log().info("  pictures: %s   numbers: %s", directory.panels, directory.metrics)
    log().info("  for a new run choose another --run-dir, or delete %s", directory.root)


def end(
    code: ExitCode, state: TrainState, validation: Validation | None, config: RunConfig, directory: RunDirectory
) -> None:
    if code == ExitCode.STOPPED:
        log().info("stopped at step %d; the same command goes on from there (exit code %d)", state.step, code)
    elif not state.is_over(config):
        log().info("step %d is reached, and saved; without --steps, or with more, the same command goes on", state.step)
    else:
        log().info("done: %d steps%s", state.step, _why_early(state, config))
        if validation:
            log().info("  validation: %s", validation)
        log().info("  pictures: %s   curves: tensorboard --logdir %s", directory.panels, directory.root)


def _why_early(state: TrainState, config: RunConfig) -> str:
    if state.step >= config.optim.total_steps:
        return ""
    best = state.best_score if config.evaluation.metric == "loss" else 1 - (state.best_score or 0)
    return (
        f", stopped early: {state.validations_since_best} validations in a row weren't better than "
        f"{config.evaluation.metric} {best:.4f} (evaluation.patience)"
    )
