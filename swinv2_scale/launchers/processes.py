"""The launcher's own processes, as a rank sees them: DeepSpeed's die of a signal and leave the ranks behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: First or second word of a command line that starts ranks.
_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "swinv2-scale"}
_MODULES = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"}


@dataclass(frozen=True)
class Process:
    """A process that was running when it was looked at.

    Attributes:
        started: clock ticks after the machine's start; with ``pid`` it names one process for ever.
    """

    pid: int
    parent: int
    started: int
    command: tuple[str, ...]

    @property
    def is_alive(self) -> bool:
        now = read(self.pid)
        return now is not None and now.started == self.started

    @property
    def is_launcher(self) -> bool:
        if any(Path(word).name in _PROGRAMS for word in self.command[:2]):
            return True
        # python -u -m MODULE ...
        return any(a == "-m" and b in _MODULES for a, b in zip(self.command, self.command[1:4], strict=False))

    @property
    def name(self) -> str:
        words = [word for word in self.command[:4] if not word.startswith("-")]
        known = (Path(word).name for word in words if Path(word).name in _PROGRAMS | _MODULES)
        return next(known, Path(self.command[0]).name if self.command else "a process")

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def read(pid: int) -> Process | None:
    """A running process; None if it isn't there, has ended without having been waited for, or there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    # The second field is the name in parentheses, which may hold anything.
    state, parent, *rest = text.rpartition(")")[2].split()
    if state in "ZX":
        return None
    return Process(pid, int(parent), int(rest[17]), tuple(words[:-1]))


def launcher_of(pid: int) -> list[Process]:
    """The processes that started ``pid`` and watch over it, from its parent up; empty without a launcher.

    For a rank of ``deepspeed`` on one node: DeepSpeed's launcher, its runner. For one that pdsh started: the launcher,
    the remote shell, the session's sshd; and on the runner's own host pdsh and the runner.
    """
    above = list(_ancestors(pid))
    last = max((index for index, process in enumerate(above) if process.is_launcher), default=None)
    if last is None:
        return []
    outermost = above[last]
    if "deepspeed.launcher.launch" not in outermost.command:
        return above[: last + 1]
    session = next((i for i, process in enumerate(above) if process.name.startswith("sshd")), last)
    return above[: session + 1] + _pdsh_of(outermost)


def hostfile_of(launcher: list[Process]) -> Path | None:
    """The host file that DeepSpeed's runner was asked to read."""
    for process in launcher:
        for word, following in zip(process.command, (*process.command[1:], ""), strict=True):
            name, _, value = word.partition("=")
            if name in ("--hostfile", "-H") and process.name in ("deepspeed", "deepspeed.pt", "ds"):
                try:
                    return Path(f"/proc/{process.pid}/cwd").readlink() / (value or following)
                except OSError:
                    return None
    return None


def _ancestors(pid: int) -> Iterator[Process]:
    process = read(pid)
    while process is not None and process.parent > 1:
        process = read(process.parent)
        if process is not None:
            yield process


def _pdsh_of(launch: Process) -> list[Process]:
    """pdsh, which isn't an ancestor of what sshd starts: the one whose command has the same list of hosts and slots."""
    world = next((word for word in launch.command if word.startswith("--world_info=")), None)
    for path in Path("/proc").glob("[0-9]*"):
        process = read(int(path.name))
        if process is not None and world and process.name == "pdsh" and world in " ".join(process.command).split():
            runner = read(process.parent)
            return [process, *([runner] if runner is not None and runner.is_launcher else [])]
    return []


def own_launcher() -> list[Process]:
    """``launcher_of`` this process."""
    return launcher_of(os.getpid())
