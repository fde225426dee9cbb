"""Typed errors: each carries its exit code and what to do next.

Everything wrong with the user's world (configuration, data, disk, cluster) is raised as one of these, printed as one
block without a traceback, and ends the process with the code below. A bug of ours stays an ordinary exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """What a launch script's exit status means, the same for every command (docs/exit-codes.md)."""

    DONE = 0
    BAD_DATA = 65  # a shard, an image, a manifest, a checkpoint or weights: damaged, missing, of another model
    DIVERGED = 70  # the loss or the gradient stayed non-finite
    CANNOT_WRITE = 73  # no space left, no permission, or the run directory is in use
    PEER_LOST = 75  # another rank died or stopped answering; start the job again
    BAD_CONFIG = 78  # configuration or cluster doesn't fit
    STOPPED = 85  # stopped by a signal after saving a checkpoint; requeue me


def printable(text: str) -> str:
    """Text from outside, which may hold what a terminal obeys or what no encoding has, with none of that in it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class ScaleError(Exception):
    """Base of all typed errors.

    Args:
        message: what was asked, what was found, and where.
        next_step: what the user can do about it, as a sentence; empty where the message says it already.
    """

    exit_code: ExitCode = ExitCode.BAD_CONFIG
    #: All ranks raise this very error, so one of them saying it is enough.
    is_shared = False

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message, next_step)
        self.message = message
        self.next_step = next_step

    def shared(self) -> Self:
        """This error, for all ranks to raise."""
        self.is_shared = True
        return self

    def __str__(self) -> str:
        text = f"{self.message}\n  next: {self.next_step}" if self.next_step else self.message
        return "\n".join(map(printable, text.split("\n")))

    @property
    def report(self) -> str:
        """The block that a job ends with."""
        return f"\nerror: {self}\n(exit code {int(self.exit_code)})"


@dataclass(frozen=True)
class ConfigProblem:
    """One thing wrong with a configuration, and where it was written."""

    key: str
    message: str
    where: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f" (did you mean {self.suggestion}?)" if self.suggestion else ""
        return f"{place}{self.key}: {self.message}{hint}"


class ConfigError(ScaleError):
    """The configuration can't be run; holds every problem found, not only the first."""

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, message: str, next_step: str = "", problems: tuple[ConfigProblem, ...] = ()) -> None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(message + lines, next_step)
        self.problems = problems


class ClusterError(ScaleError):
    """The processes that were started are not the ones that were asked for."""

    exit_code = ExitCode.BAD_CONFIG


class DataError(ScaleError):
    """A shard, a manifest or a sample is missing, damaged or too small."""

    exit_code = ExitCode.BAD_DATA


class SampleError(DataError):
    """One sample is damaged or isn't what the task needs; a run may put it into quarantine and go on."""


class CheckpointError(ScaleError):
    """A checkpoint is missing, incomplete or damaged."""

    exit_code = ExitCode.BAD_DATA


class WeightsError(ScaleError):
    """A weights file is missing, damaged, of another model, or can't be kept in the format that is asked for."""

    exit_code = ExitCode.BAD_DATA


class DivergedError(ScaleError):
    """Loss or gradient stayed non-finite for longer than the configuration allows."""

    exit_code = ExitCode.DIVERGED


class OutputError(ScaleError):
    """The run directory can't be written or belongs to another job."""

    exit_code = ExitCode.CANNOT_WRITE


class PeerLostError(ScaleError):
    """Another rank died or no longer answers."""

    exit_code = ExitCode.PEER_LOST
