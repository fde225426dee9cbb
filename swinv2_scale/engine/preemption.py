"""Reasons to stop: noted when they come, read at the step boundary and nowhere else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from swinv2_scale.launchers.processes import Process

#: SIGTERM: schedulers and launchers; SIGUSR1: Slurm's --signal; SIGINT: a person; SIGHUP: a terminal that was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
#: How often the file is looked for: run directories are on shared disks.
_PERIOD_S = 1.0


class StopRequest:
    """The first reason to stop this job that this process has seen; later ones change nothing.

    The signal handlers stay: launchers signal ranks one after another, and a second signal must not kill the save.

    Args:
        launcher: whose end is a reason; DeepSpeed's dies of a signal without a word to the ranks.
        file: whose existence is a reason (RUN/stop); None where another rank looks.
        end_time: when the job is killed, in Unix seconds; None: never.
        grace_s: how long before ``end_time`` to stop, besides the longest time between two looks.
    """

    def __init__(
        self,
        launcher: Sequence[Process] = (),
        file: Path | None = None,
        end_time: float | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self._launcher, self._file = launcher, file
        self._end_time, self._grace_s = end_time, grace_s
        self._signal: signal.Signals | None = None
        self._reason: str | None = None
        self._file_seen_at = self._looked_at = self._longest_s = 0.0
        on_stop_signals(self._note)

    @property
    def is_made(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why to stop, as a few words; None to go on. Called once a step."""
        self._reason = self._reason or self._find()
        return self._reason

    @reason.setter
    def reason(self, why: str) -> None:
        """The one that all ranks go by."""
        self._reason = why

    def _find(self) -> str | None:
        now = time.monotonic()
        if self._looked_at:
            self._longest_s = max(self._longest_s, now - self._looked_at)
        self._looked_at = now
        if self._signal:
            return self._signal.name
        gone = next((process for process in self._launcher if not process.is_alive), None)
        if gone:
            return f"the launcher's {gone} has ended"
        if self._file and now - self._file_seen_at > _PERIOD_S:
            self._file_seen_at = now
            if self._file.exists():
                return f"{self._file} is there"
        if self._end_time and time.time() + self._grace_s + self._longest_s > self._end_time:
            return f"the job's time ends at {time.strftime('%H:%M:%S', time.localtime(self._end_time))}"
        return None

    def _note(self, number: int, frame: FrameType | None) -> Any:
        self._signal = self._signal or signal.Signals(number)


def on_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let a handler have every stop signal of this process."""
    for number in STOP_SIGNALS:
        # nohup: who closes the terminal wants the job to go on.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_of_slurm_job() -> float | None:
    """When Slurm will end this job, in Unix seconds; None where it doesn't say.

    Slurm sets the variable itself since 23.02; launch/slurm/pretrain.sbatch sets it where it doesn't.
    """
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None
