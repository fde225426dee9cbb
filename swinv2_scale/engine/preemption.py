"""Stop signals: noted when they come, read at the step boundary and nowhere else."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

#: SIGTERM: schedulers and launchers; SIGUSR1: Slurm's --signal; SIGINT: a person.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first stop signal of this process; later ones change nothing.

    The handlers stay: launchers signal ranks one after another, and a second signal must not kill the save.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    @property
    def is_made(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> Any:
        self.signal = self.signal or signal.Signals(number)
