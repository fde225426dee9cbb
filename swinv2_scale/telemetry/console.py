"""Logs of every rank, and the progress line of rank 0."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from swinv2_scale.errors import printable

_LOGGER = logging.getLogger("swinv2_scale")


class _Formatter(logging.Formatter):
    """Names from outside come into messages; whoever reads a log file does so in a terminal too."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def log() -> logging.Logger:
    """The package's logger: rank 0 shows INFO on the console, every rank keeps all of it in RUN/log/rank-N.log."""
    return _LOGGER


def start_logging(rank: int) -> None:
    """Console output: rank 0 speaks, the others only when something is wrong; warnings go to the log files."""
    logging.captureWarnings(True)
    _LOGGER.handlers.clear()
    _LOGGER.setLevel(logging.DEBUG)
    _LOGGER.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    console.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    _LOGGER.addHandler(console)


def log_to_file(path: Path, *others: logging.Logger) -> None:
    """Keep everything that this rank logs, and what ``others`` (the libraries') log, in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for logger in (_LOGGER, logging.getLogger("py.warnings"), *others):
        logger.addHandler(handler)


class ProgressLine:
    """Step, loss, rate, data wait, time left and memory: a live bar on a terminal, plain lines elsewhere.

    Args:
        total_steps: the last step of the training.
        every: a plain line is written after so many steps.
        enabled: False on all ranks but one.
    """

    def __init__(self, total_steps: int, every: int, enabled: bool) -> None:
        self._total, self._every, self._enabled = total_steps, every, enabled
        self._seconds: list[float] = []
        self._bar: Progress | None = None
        if enabled and sys.stdout.isatty():
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(file=sys.stdout), transient=False)
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def show(
        self, step: int, loss: float, images_per_second: float, wait: float, step_seconds: float, memory_bytes: int
    ) -> None:
        """
        Args:
            wait: share of the step that was spent waiting for data, 0 to 1.
            step_seconds: wall-clock of this step; the time left is reckoned from the last 50.
        """
        if not self._enabled:
            return
        self._seconds = [*self._seconds[-49:], step_seconds]
        left = sorted(self._seconds)[len(self._seconds) // 2] * (self._total - step)
        text = (
            f"loss {loss:.4f}  {images_per_second:.0f} images/s  data wait {wait:.0%}  "
            f"left {_duration(left)}  memory {memory_bytes / 2**30:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or step == self._total or len(self._seconds) == 1:
            _LOGGER.info("step %d/%d  %s", step, self._total, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
