"""The run directory: layout, one job at a time, and a line for every life of the run.

Two things keep jobs apart. The lock says at once that a run is in use, where the file system has locks between the
nodes. Where it hasn't, or where a job that was taken for dead wakes up, the staging folder decides: every life writes
its checkpoints into one of its own, a new life deletes those of the others first, and what isn't there can't be renamed
into a checkpoint. So the life that began last is the only one that can publish.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from swinv2_scale.durable import sync_folder, write_whole
from swinv2_scale.engine.checkpoint import PART
from swinv2_scale.errors import OutputError
from swinv2_scale.telemetry.console import log


def is_run_or_checkpoint(path: Path) -> bool:
    """Whether a path looks like a run, its ``checkpoints/`` or one of them; opening it says whether it is whole."""
    names = ("checkpoints", "manifest.json")
    return path.is_dir() and (any((path / name).exists() for name in names) or any(path.glob("step-*")))


@dataclass
class RunDirectory:
    """``RUN/``: config.yaml, {metrics,quarantine,anomalies,lives}.jsonl, tensorboard/, panels/, checkpoints/, log/."""

    root: Path
    #: Of the life that open() began; rank 0 tells the others.
    life: str = ""
    #: The last one that this life has finished, as far as its files say; None before it trains.
    step: int | None = None
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

    @property
    def lives(self) -> Path:
        """Two lines for every life: how it began and how it ended; one that was killed has no second."""
        return self.root / "lives.jsonl"

    @property
    def stop(self) -> Path:
        """A file that asks the running job to save and stop; the next life deletes it."""
        return self.root / "stop"

    @property
    def staging(self) -> Path:
        """Where this life writes checkpoints before they are published."""
        return self.checkpoints / f"{PART}{self.life}"

    def log(self, rank: int) -> Path:
        return self.root / "log" / f"rank-{rank}.log"

    def open(self) -> str:
        """Begin a life of the run, after which no other can publish a checkpoint; by rank 0 alone.

        Returns:
            its name, for the other ranks' ``life``.

        Raises:
            OutputError: another job is using it, or it can't be written.
        """
        self.lock()
        self.life = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self._end_other_lives()
            self.stop.unlink(missing_ok=True)
            self.staging.mkdir()
        except OSError as error:
            self.close()
            raise OutputError(f"cannot write {self.checkpoints}: {error}", "choose another --run-dir") from error
        return self.life

    def lock(self) -> None:
        """Make the folders and take the lock.

        Raises:
            OutputError: another job is using it, or it can't be written.
        """
        try:
            new = [folder for folder in self.root.parents if not folder.exists()]
            for folder in (self.checkpoints, self.panels, self.root / "log"):
                folder.mkdir(parents=True, exist_ok=True)
            # A checkpoint that is safe in a folder whose own name isn't would be gone after a power cut.
            for folder in (self.root, self.root.parent, *(folder.parent for folder in new)):
                sync_folder(folder)
            self._refuse_links()
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

    def _refuse_links(self) -> None:
        """An unpacked run of somebody else's could have links where files are written, to files that are not its own.

        Folders may lie elsewhere: checkpoints on a large disk, by a link, are usual.

        Raises:
            OutputError: there is one.
        """
        for folder in (self.root, self.panels, self.root / "log"):
            for path in folder.iterdir():
                if path.is_symlink() and not path.is_dir():
                    raise OutputError(f"{path} is a link; a run writes its own files", "replace it by what it means")

    def _end_other_lives(self) -> None:
        """Delete what killed saves and deletions left; renamed first, as a name vanishes at one instant."""
        for path in self.checkpoints.glob(f"{PART}*"):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            gone = path.with_name(f"{PART}gone-{secrets.token_hex(4)}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def write_config(self, text: str) -> None:
        write_whole(self.config, text)

    def record_life(self, **facts: Any) -> None:
        """Add a line about this start of the run: when, where, from which step, with what command."""
        begun = {"started": _now(), "life": self.life, "host": socket.gethostname(), "command": sys.argv}
        self._add_to_lives(begun | facts)

    def record_end(self, exit_code: int, why: str = "") -> None:
        """Add a line about how this life ended; by rank 0 alone, while it still has the lock.

        An attempt that didn't become a life has one too, where the run has begun and no other job is using it: its
        ranks never met, say. One that found nothing left to do has none. Failing to write it is no error, as the end
        that it is about is what counts.
        """
        if exit_code == 0 and self.step is None:
            return
        try:
            if self._lock is None:
                if not self.lives.exists():
                    return
                self.lock()
            facts = {"ended": _now(), "life": self.life, "exit_code": exit_code, "step": self.step}
            self._add_to_lives(facts | ({"why": why.split("\n")[0][:500]} if why else {}))
        except (OSError, OutputError):
            log().debug("the end of this life could not be recorded:", exc_info=True)

    def _add_to_lives(self, line: dict[str, Any]) -> None:
        with self.lives.open("a+b") as file:
            text = json.dumps(line).encode() + b"\n"
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text  # a power cut left half a line
            file.write(text)

    def close(self) -> None:
        if self._lock is not None and self.life:
            with contextlib.suppress(OSError):  # not empty: a save was given up, the next life deletes it
                self.staging.rmdir()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
