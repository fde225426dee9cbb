"""An end for what may hang inside the tests' own process; jobs of several processes have that of processes.py."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class DeadlineReached(BaseException):
    """No Exception: nothing that is being tested takes it for an error of a file."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise in this thread, the main one, if the block takes longer; waiting system calls end too."""

    def too_late(number: int, frame: object) -> None:
        raise DeadlineReached(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
