"""What a run directory says of its run, to somebody who looks while a job may be using it.

Nothing is written, no lock is taken, torch is not imported. Files are taken as they are found: cut by a power cut,
being written, or not ours at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import statistics
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.durable import open_plain
from swinv2_scale.engine.checkpoint import PREFIX, Checkpoint, read, read_state
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.errors import CheckpointError, ConfigError, ExitCode

#: So many lives in a row that began at one step and saved nothing: one more would be no better.
FRUITLESS_LIVES = 3
#: Rows that rates are reckoned from.
_RECENT = 50
_METRICS_BYTES, _LIST_BYTES = 256 * 2**10, 16 * 2**20
_CONFIG_BYTES = 2**20

#: What names of metrics on held-back samples begin with.
_VALIDATION = "validation_"

#: How lives end that another one may follow; None: killed.
_TO_START_AGAIN = (None, ExitCode.PEER_LOST, ExitCode.STOPPED)

State = Literal["not begun", "running", "finished", "stopped", "killed", "failed"]


@dataclass(frozen=True)
class Life:
    """One start of a run.

    Attributes:
        started, ended: as they were written, empty where nothing was: a life that was killed has no end, and an
            attempt that ended before it trained no start.
        from_step: of the checkpoint that it went on from, 0 for none.
        step: the last one it finished.
        exit_code: None if it was killed, or runs.
    """

    name: str
    started: str = ""
    ended: str = ""
    host: str = ""
    from_step: int | None = None
    world_size: int | None = None
    step: int | None = None
    exit_code: int | None = None
    why: str = ""
    command: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """How it ended, in words."""
        if self.exit_code is None:
            return "ended without a word: killed, or its machine went down"
        if self.exit_code == ExitCode.DONE:
            return "done"
        if self.exit_code == ExitCode.STOPPED:
            return f"asked to stop: {self.why}" if self.why else "asked to stop"
        return f"exit code {self.exit_code}: {self.why}" if self.why else f"exit code {self.exit_code}"


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        reason: what there is to say about the state.
        step: the last one in its metrics.
        validation: metrics of the last evaluation that is in the end of its metrics, by name; empty without one.
        images_per_second, step_seconds: medians of the last steps; None without any.
        checkpoint: the newest whose manifest can be read; whether it is whole only ``checkpoint verify`` says.
        quarantined, anomalies: rows of the files of that name (of their last 16 MiB).
    """

    path: Path
    state: State
    reason: str
    config: RunConfig | None
    step: int
    loss: float | None
    validation: dict[str, float]
    images_per_second: float | None
    step_seconds: float | None
    lives: tuple[Life, ...]
    checkpoint: Checkpoint | None
    num_checkpoints: int
    quarantined: int
    anomalies: int

    def ended(self, life: Life) -> str:
        """How a life of it ended, in words; ``running`` while it goes on."""
        is_last = life is self.lives[-1]
        return "running" if is_last and self.state == "running" and life.exit_code is None else life.reason

    @property
    def total_steps(self) -> int | None:
        return self.config.optim.total_steps if self.config else None

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the rate of the last steps."""
        if self.step_seconds is None or self.total_steps is None:
            return None
        return self.step_seconds * max(self.total_steps - self.step, 0)

    @property
    def checkpoint_age_s(self) -> float | None:
        if self.checkpoint is None:
            return None
        try:
            return max(time.time() - self.checkpoint.path.stat().st_mtime, 0.0)
        except OSError:
            return None

    @property
    def exit_code(self) -> int:
        """What a batch script goes by: 0 nothing is left to do, 85 start it again, 73 a job has it.

        Anything else is the code of an end that another start wouldn't change; 75 after FRUITLESS_LIVES.
        """
        if self.state == "running":
            return ExitCode.CANNOT_WRITE
        if self.state in ("finished", "not begun"):
            return ExitCode.DONE if self.state == "finished" else ExitCode.STOPPED
        code = self.lives[-1].exit_code
        if code in _TO_START_AGAIN:
            return ExitCode.PEER_LOST if _is_going_round(self.lives, self.checkpoint) else ExitCode.STOPPED
        return code or ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        found = self.checkpoint
        return {
            "run": str(self.path),
            "state": self.state,
            "reason": self.reason,
            "exit_code": int(self.exit_code),
            "task": self.config.task.name if self.config else None,
            "variant": self.config.model.variant if self.config else None,
            "init_from": self.config.init_from if self.config else None,
            "step": self.step,
            "total_steps": self.total_steps,
            "loss": self.loss,
            "validation": self.validation,
            "images_per_second": self.images_per_second,
            "seconds_left": self.seconds_left,
            "lives": [{**vars(life), "reason": self.ended(life)} for life in self.lives],
            "checkpoint": found and {"step": found.step, "bytes": found.num_bytes, "age_s": self.checkpoint_age_s},
            "checkpoints": self.num_checkpoints,
            "quarantined": self.quarantined,
            "anomalies": self.anomalies,
        }


def read_status(path: Path) -> RunStatus:
    """Look at a run directory.

    Raises:
        ConfigError: there is no such folder.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} {'is no folder' if path.exists() else 'does not exist'}", "name a run directory")
    directory = RunDirectory(path)
    config = _config(directory.config)
    lives = _lives(_rows(directory.lives, _LIST_BYTES))
    checkpoints = _checkpoints(directory.checkpoints)
    newest = checkpoints[0] if checkpoints else None
    found = [row for row in _rows(directory.metrics, _METRICS_BYTES) if _count(row, "step") is not None]
    rows = found[-_RECENT:]
    step = (_count(rows[-1], "step") if rows else None) or 0
    state, reason = _state(directory, config, lives, newest)
    return RunStatus(
        path=path,
        state=state,
        reason=reason,
        config=config,
        step=max(step, newest.step if newest and not rows else 0),
        loss=_number(rows[-1], "loss") if rows else None,
        validation=next((metrics for row in reversed(found) if (metrics := _validation(row))), {}),
        images_per_second=_median(rows, "images_per_second"),
        step_seconds=_median(rows, "step_seconds"),
        lives=lives,
        checkpoint=newest,
        num_checkpoints=len(checkpoints),
        quarantined=len(_rows(directory.quarantine, _LIST_BYTES)),
        anomalies=len(_rows(directory.anomalies, _LIST_BYTES)),
    )


def _state(
    directory: RunDirectory, config: RunConfig | None, lives: tuple[Life, ...], newest: Checkpoint | None
) -> tuple[State, str]:
    is_locked, holder = _holder(directory.root / ".lock")
    if is_locked:
        return "running", holder or "a job has the lock"
    if config and newest and is_done(newest, config):
        is_early = newest.step < config.optim.total_steps
        return "finished", f"evaluation.patience was used up at step {newest.step}" if is_early else ""
    if not lives:
        return "not begun", "no life of it is on record"
    last = lives[-1]
    if last.exit_code is None and _is_alive_elsewhere(directory, config, holder):
        return "running", f"{holder} (its files have changed lately; no lock is seen from here)"
    if _is_going_round(lives, newest):
        where = f"step {newest.step}" if newest else "the beginning"
        return "failed", f"{FRUITLESS_LIVES} lives in a row got no further than {where}; the last one: {last.reason}"
    if last.exit_code is None:
        return "killed", last.reason
    if last.exit_code == ExitCode.DONE:
        return "finished", f"--steps {last.step} was reached" if last.step is not None else ""
    return ("stopped" if last.exit_code == ExitCode.STOPPED else "failed"), last.reason


def is_done(newest: Checkpoint, config: RunConfig) -> bool:
    """Whether a run that has saved this has nothing left to do: all steps are made, or its patience is used up."""
    if newest.step >= config.optim.total_steps:
        return True
    if config.evaluation.patience is None:
        return False
    try:
        return (_count(read_state(newest), "validations_since_best") or 0) >= config.evaluation.patience
    except CheckpointError:
        return False


def _is_going_round(lives: Sequence[Life], newest: Checkpoint | None) -> bool:
    """Whether the last lives all ended without a checkpoint that the ones before hadn't, and without an error.

    One that was asked to stop after its first step would have saved.
    """
    recent = lives[-FRUITLESS_LIVES:]
    saved = newest.step if newest else 0
    began_there = all(life.from_step is None or life.from_step >= saved for life in recent)
    can_go_on = all(life.exit_code in _TO_START_AGAIN for life in recent)
    return len(recent) == FRUITLESS_LIVES and began_there and can_go_on


def _holder(lock: Path) -> tuple[bool, str]:
    """Whether a process has the run's lock, asked without touching it, and who had it last, as it wrote."""
    try:
        with open_plain(lock) as file:
            # struct flock: type, whence, start, length, process id
            asked = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack("@hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return found[0] != fcntl.F_UNLCK, file.read(300).decode("utf-8", "replace").strip()
    except OSError:
        return False, ""


def _is_alive_elsewhere(directory: RunDirectory, config: RunConfig | None, holder: str) -> bool:
    """Where locks don't reach from node to node: whether another host's job has written lately.

    Longer than ``cluster.timeout_s`` no living job is silent: its watchdog would have ended it.
    """
    host = re.match(r"pid \d+ on (\S+),", holder)
    if host is None or host[1] == socket.gethostname():
        return False
    written = [0.0]
    for path in (directory.metrics, directory.lives, directory.log(0)):
        try:
            written.append(path.stat().st_mtime)
        except OSError:
            continue
    return time.time() - max(written) < (config.cluster.timeout_s if config else 1800)


def _config(path: Path) -> RunConfig | None:
    """The resolved configuration; None where it can't be read, as another version's can't."""
    try:
        if not path.is_file() or path.stat().st_size > _CONFIG_BYTES:
            return None
        return load_config(path).config
    except (OSError, ConfigError):
        return None


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """Published ones, newest first; a damaged manifest isn't one."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        try:
            found.append(read(path))
        except CheckpointError:
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def _lives(rows: list[dict[str, Any]]) -> tuple[Life, ...]:
    """In the order of their first lines."""
    merged: list[dict[str, Any]] = []
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = _text(row, "life")
        if "ended" in row and name in by_name:
            by_name[name].update(row)
        else:
            merged.append(dict(row))
            if name:
                by_name[name] = merged[-1]
    return tuple(
        Life(
            name=_text(row, "life"),
            started=_text(row, "started"),
            ended=_text(row, "ended"),
            host=_text(row, "host"),
            from_step=_count(row, "from_step"),
            world_size=_count(row, "world_size"),
            step=_count(row, "step"),
            exit_code=code if (code := _count(row, "exit_code")) is None or code < 256 else None,
            why=_text(row, "why"),
            command=tuple(str(word) for word in row["command"]) if isinstance(row.get("command"), list) else (),
        )
        for row in merged
    )


def _rows(path: Path, max_bytes: int) -> list[dict[str, Any]]:
    """The JSON objects, one a line, of the last so many bytes of a file; empty where there is none."""
    try:
        with open_plain(path) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - max_bytes, 0))
            lines = file.read(max_bytes).decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _count(row: dict[str, Any], name: str) -> int | None:
    value = row.get(name)
    return value if type(value) is int and 0 <= value < 2**31 else None


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else None  # NaN isn't, either


def _validation(row: dict[str, Any]) -> dict[str, float]:
    values = {key.removeprefix(_VALIDATION): _number(row, key) for key in row if key.startswith(_VALIDATION)}
    return {key: value for key, value in values.items() if value is not None}


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [value for row in rows if (value := _number(row, name)) is not None]
    return statistics.median(values) if values else None
