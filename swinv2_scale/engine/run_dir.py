"""The run directory: layout, one job at a time, and a line for every life of the run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from swinv2_scale.errors import OutputError


def is_run_or_checkpoint(path: Path) -> bool:
    """Whether a path looks like a run, its ``checkpoints/`` or one of them; opening it says whether it is whole."""
    names = ("checkpoints", "manifest.json")
    return path.is_dir() and (any((path / name).exists() for name in names) or any(path.glob("step-*")))


@dataclass
class RunDirectory:
    """``RUN/``: config.yaml, {metrics,quarantine,anomalies,lives}.jsonl, tensorboard/, panels/, checkpoints/, log/."""

    root: Path
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def anomalies(self) -> Path:
        return self.root / "anomalies.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def panels(self) -> Path:
        return self.root / "panels"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def log(self, rank: int) -> Path:
        return self.root / "log" / f"rank-{rank}.log"

    def open(self) -> None:
        """Make the folders and take the lock; by rank 0 alone.

        Raises:
            OutputError: another job is using it, or it can't be written.
        """
        try:
            for folder in (self.checkpoints, self.panels, self.root / "log"):
                folder.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write the run directory {self.root}: {error}", "choose another --run-dir"
            ) from error
        try:
            # A record lock: loader workers, which outlive a killed rank by seconds, don't inherit it as flock's.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OutputError(
                    f"cannot lock {self.root}: {error}", "put the run directory on another disk"
                ) from error
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise OutputError(
                f"{self.root} is in use by {holder}", "wait for that job, stop it, or choose another --run-dir"
            ) from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        self._lock = lock

    def write_config(self, text: str) -> None:
        part = self.config.with_name("config.yaml.part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.config)

    def record_life(self, **facts: Any) -> None:
        """Add a line about this start of the run: when, where, from which step, with what command."""
        line = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "command": sys.argv,
            **facts,
        }
        with (self.root / "lives.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
