"""From where a job goes on, and whether it may: the checkpoint's run compared with the one that is asked for."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig, flatten
from swinv2_scale.config.rules import changes
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.source import as_tuples
from swinv2_scale.data.shards.shard_set import ShardSet
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.checkpoint import Checkpoint
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.step import TrainState
from swinv2_scale.errors import CheckpointError, ConfigError, DataError, OutputError
from swinv2_scale.telemetry.console import log

Resume = Literal["auto", "required", "never"]


def find_checkpoint(
    resume: Resume, directory: RunDirectory, loaded: LoadedConfig, train: ShardSet
) -> tuple[Checkpoint | None, TrainState, LoadedConfig]:
    """The newest whole checkpoint of the run directory, if its run is this one, where it stands, and what it settled.

    Called by all ranks; without a checkpoint the state is the beginning, and nothing is settled yet.

    Raises:
        CheckpointError: all checkpoints are damaged, or one is required and there is none.
        OutputError: a new run is wanted where there is one already.
        ConfigError: a key differs that may not change.
        DataError: the training shards differ.
    """
    found = checkpoint.newest_verified(directory.checkpoints)
    if found is None:
        if resume == "required":
            raise CheckpointError(
                f"--resume required, but {directory.checkpoints} holds no checkpoint",
                "correct --run-dir, or start a new run with --resume auto",
            )
        return None, TrainState(), loaded
    if resume == "never":
        raise OutputError(
            f"--resume never, but {directory.root} holds a run at step {found.step}",
            "choose another --run-dir for a new run; nothing here is overwritten",
        )
    state, facts = dist.on_rank_zero(lambda: read_state(found), f"reading {found.path}")
    windows = as_tuples(facts["config"].get("model.pretrained_window_sizes"))
    if windows:
        asked = loaded.config.model
        if any(asked.pretrained_window_sizes or ()):
            windows = asked.settled.pretrained_window_sizes
        loaded = loaded.with_value(("model", "pretrained_window_sizes"), windows, "settled when the run began")
    if loaded.config.init_from:
        log().info("init_from is not read: this run goes on from its own checkpoint")
    _compare_runs(facts, loaded.config, train, directory)
    log().info("resuming from %s: step %d, every file verified", found.path, found.step)
    return found, state, loaded


def read_state(found: Checkpoint) -> tuple[TrainState, dict[str, Any]]:
    """The training's state in a checkpoint, and the facts that facts_of() gave.

    Raises:
        CheckpointError: it was made by another version.
    """
    data = checkpoint.read_state(found)
    try:
        return TrainState.from_json(data), data
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{found.path} was made by another version: its state doesn't fit ({error!r})",
            "finish that run with the version that began it, or choose another --run-dir",
        ) from error


def facts_of(config: RunConfig, train: ShardSet, labels: tuple[str, ...]) -> dict[str, Any]:
    """What a checkpoint says about its run.

    Args:
        labels: names of classes, if there are any.
    """
    return {"config": plain(config), "train_digest": train.digest, "labels": labels, "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on, and the git revision where this is a checkout."""
    names = ("swinv2-scale", "torch", "deepspeed", "webdataset", "numpy")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {**found, "git": _git_revision()}


@cache
def _git_revision() -> str:
    """``a1b2c3d``, with ``+changes`` where files differ from it; empty without git or outside our own checkout."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603  no shell
        return found.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return ""  # a virtual environment in somebody's repository
        return git("describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _compare_runs(facts: dict[str, Any], config: RunConfig, train: ShardSet, directory: RunDirectory) -> None:
    differing = changes(facts["config"], plain(config))
    if any(change.policy == "fixed" for change in differing):
        lines = "".join(f"\n  - {change}" for change in differing)
        raise ConfigError(
            f"{directory.root} holds a run of another configuration:{lines}",
            "take the values back that may not change, or choose another --run-dir for a new run",
        )
    for change in differing:
        log().info("changed since the checkpoint: %s", change)
    if facts["train_digest"] != train.digest:
        raise DataError(
            f"the training shards are not the ones that {directory.root} was trained on (their manifests differ)",
            "point data.train to the same shards, or choose another --run-dir for a new run",
        )


def plain(config: RunConfig) -> dict[str, Any]:
    """Flat, and as JSON gives it back: lists for tuples."""
    flat: dict[str, Any] = json.loads(json.dumps({".".join(key): value for key, value in flatten(config).items()}))
    return flat
