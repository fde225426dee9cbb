"""Jobs started the way users start them, by real launchers, and every process that belongs to one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import DEADLINE_S, OF_LAUNCHERS, REPOSITORY, free_port

PROGRAMS = Path(sys.executable).parent


@dataclass
class Launched:
    """A job, from the outermost process down.

    Attributes:
        run: its run directory, by whose path its processes are known.
    """

    process: subprocess.Popen[bytes]
    run: Path
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def members(self) -> list[tuple[int, str]]:
        """(process id, command line) of all that are alive, on this machine's hosts."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(self.run) in words or any(f" {self.run} " in word for word in words):
                found.append((int(path.name), " ".join(words)))
        return found

    def member(self, text: str, without: str = "\0") -> int:
        """The process id of the first member whose command line has a text."""
        return min(pid for pid, command in self.members() if text in command and without not in command)

    def wait_for_step(self, step: int) -> None:
        """Until its metrics have the row of a step."""
        metrics, end = self.run / "metrics.jsonl", time.monotonic() + DEADLINE_S
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
            assert self.process.poll() is None, self._report()
            assert time.monotonic() < end, self._report()
            time.sleep(0.05)

    def wait(self, at_most_s: float = DEADLINE_S) -> int:
        """The exit code, when the outermost process and every other one have ended."""
        end = time.monotonic() + at_most_s
        while (code := self.process.poll()) is None or self.members():
            if time.monotonic() > end:
                report = self._report()
                self.kill()
                raise AssertionError(f"deadline reached, code {code}:\n{report}")
            time.sleep(0.05)
        return code

    def _report(self) -> str:
        """Output, who is alive, what ranks wrote down: a launcher that hangs doesn't pass on what they print."""
        alive = [f"alive: {pid} {command}" for pid, command in self.members()]
        logs = [f"{path}:\n{path.read_text()[-5000:]}" for path in sorted(self.run.glob("log/rank-*.log"))]
        return "\n".join([self.output, *alive, *logs])

    def kill(self) -> None:
        for pid, _ in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def environment() -> dict[str, str]:
    """A user's: nothing of a launcher, and threads that sleep while they wait."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    return kept | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
    }


def start(command: Sequence[object], run: Path, **variables: str) -> Launched:
    """Start a command that trains in ``run``; it says so with ``--run-dir``."""
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_name(f"{run.name}-{time.monotonic_ns()}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=REPOSITORY,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return Launched(process, run, log)


def pretrain(config: Path, run: Path, *arguments: object) -> list[object]:
    """The words of a training, behind those of a launcher."""
    return [REPOSITORY / "launch" / "pretrain.py", "--config", config, "--run-dir", run, *arguments]


def deepspeed(*options: object) -> list[object]:
    return [PROGRAMS / "deepspeed", "-q", "--master_port", free_port(), *options]


def torchrun(*options: object) -> list[object]:
    return [PROGRAMS / "torchrun", "--master-port", free_port(), *options]
