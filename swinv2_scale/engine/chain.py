"""Where the stages of a recipe stand, and whether one may begin: what their run directories say. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.recipe import Recipe, Stage, shape_differences
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.source import as_tuples, format_value
from swinv2_scale.engine.checkpoint import Checkpoint, open_run_or_checkpoint, read_state
from swinv2_scale.engine.status import RunStatus, is_done, read_status
from swinv2_scale.errors import CheckpointError


@dataclass(frozen=True)
class StageStatus:
    """A stage at one moment.

    Attributes:
        run: None before it is started.
    """

    stage: Stage
    run: RunStatus | None

    @property
    def is_finished(self) -> bool:
        """By the recipe's configuration: a run that was begun for fewer steps is not."""
        return self.run is not None and self.run.checkpoint is not None and is_done(self.run.checkpoint, self.config)

    @property
    def state(self) -> str:
        if self.run is None or self.run.state == "not begun":
            return "not started"
        if self.is_finished and self.run.state != "running":
            return "finished"
        # ``--steps``, or a total that was smaller: for the recipe it is not over.
        return "stopped" if self.run.state == "finished" else self.run.state

    @property
    def config(self) -> RunConfig:
        return self.stage.config

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        model = self.config.model
        return {
            "stage": self.stage.name,
            "number": self.stage.number,
            "state": self.state,
            "task": self.config.task.name,
            "variant": model.variant,
            "image_size": model.image_size,
            "window_size": model.window_size,
            "step": self.run.step if self.run else 0,
            "total_steps": self.config.optim.total_steps,
            "starts_from": self.stage.predecessor and self.stage.predecessor.name,
            "run_dir": str(self.stage.run_dir),
            "run": self.run and self.run.to_json(),
        }


def stage_status(stage: Stage) -> StageStatus:
    """Look at a stage's run directory."""
    return StageStatus(stage, read_status(stage.run_dir) if stage.run_dir.is_dir() else None)


def chain_status(recipe: Recipe) -> tuple[StageStatus, ...]:
    """Look at all run directories of a recipe."""
    return tuple(stage_status(stage) for stage in recipe.stages)


def check_start(stage: Stage, finish: str, repair: str) -> None:
    """Whether what a stage starts from is there, whole, finished, and the model that the recipe says.

    A stage that has a checkpoint of its own goes on from that, and needs nothing else.

    Args:
        finish: the command that brings its predecessor to its end.
        repair: the one that makes its last checkpoint once more, from an earlier one.

    Raises:
        CheckpointError: with the command to type.
    """
    before, own = stage.predecessor, stage_status(stage)
    if before is None or (own.run is not None and own.run.checkpoint is not None):
        return
    begin, next_step = f"stage {stage.name} starts from {before.name}", f"this finishes it: {finish}"
    found = stage_status(before)
    if found.run is None:
        raise CheckpointError(f"{begin}, which has not been started: there is no {before.run_dir}", next_step)
    if not found.is_finished:
        steps = f"step {found.run.step} of {before.config.optim.total_steps}"
        raise CheckpointError(f"{begin}, whose run {before.run_dir} is {found.state} at {steps}", next_step)
    try:
        newest = open_run_or_checkpoint(before.run_dir)
    except CheckpointError as error:
        raise CheckpointError(f"{begin}: {error.message}", f"restore it from a copy, or: {repair}") from error
    if not is_done(newest, before.config):
        message = f"{begin}, whose last checkpoint is damaged; the newest whole one is {newest.path}"
        raise CheckpointError(message, f"this trains from there to the end again: {repair}")
    _check_model(before, newest, begin)


def _check_model(before: Stage, newest: Checkpoint, begin: str) -> None:
    """Whether a checkpoint is of the model that the recipe has for its stage."""
    saved = read_state(newest)["config"]
    fields = {key.removeprefix("model."): as_tuples(value) for key, value in saved.items() if key.count(".") == 1}
    fields = {key: value for key, value in fields.items() if key in ModelConfig.model_fields}
    try:
        model = ModelConfig(**fields)
    except ValidationError as error:
        raise CheckpointError(f"{begin}, but {newest.path} doesn't say which model it holds: {error}") from error
    expected = before.config.model
    names = [name for name, _ in shape_differences(expected, model)]
    names += [name for name in ("in_channels", "num_classes") if getattr(expected, name) != getattr(model, name)]
    if names:
        values = "; ".join(
            f"{name} {format_value(getattr(model, name))}, the recipe has {format_value(getattr(expected, name))}"
            for name in dict.fromkeys(names)
        )
        raise CheckpointError(
            f"{begin}, but {newest.path} is of another model: {values}",
            "take another --dir, or correct the recipe's configuration or overrides",
        )
