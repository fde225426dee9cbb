"""Start the ranks of a job as plain processes: what a launcher does, without its seconds of imports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
#: No job of a test takes longer on two busy cores; a hang fails instead of stopping CI.
DEADLINE_S = 240


@dataclass
class Finished:
    """Exit codes of the ranks, and everything they printed."""

    codes: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def code(self) -> int:
        """The one code that all ranks ended with."""
        assert len(set(self.codes)) == 1, f"ranks disagree: {self.codes}\n{self.output}"
        return self.codes[0]


@dataclass
class Job:
    """The running ranks of a job."""

    ranks: list[subprocess.Popen[str]]

    def wait(self) -> Finished:
        """All ranks to their end; kills them at the deadline and fails."""
        end = time.monotonic() + DEADLINE_S
        try:
            outputs = [rank.communicate(timeout=max(end - time.monotonic(), 1))[0] for rank in self.ranks]
        except subprocess.TimeoutExpired:
            for rank in self.ranks:
                rank.kill()
            outputs = [rank.communicate()[0] for rank in self.ranks]
            raise AssertionError("deadline reached:\n" + "\n".join(outputs)) from None
        return Finished([rank.returncode for rank in self.ranks], outputs)


def start(script: Path, *arguments: object, processes: int = 1) -> Job:
    """Start ``script`` as so many ranks of one job; one rank gets no launcher's environment at all."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    port = _free_port()
    ranks = []
    for rank in range(processes):
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(script), *map(str, arguments)]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return Job(ranks)


def pretrain(*arguments: object, processes: int = 1) -> Finished:
    """Run launch/pretrain.py to its end."""
    return start_pretrain(*arguments, processes=processes).wait()


def start_pretrain(*arguments: object, processes: int = 1) -> Job:
    return start(REPOSITORY / "launch" / "pretrain.py", *arguments, processes=processes)


def run_worker(name: str, *arguments: object, processes: int) -> Finished:
    """Run a script of tests/distributed/workers/ as the ranks of a job; it has to succeed on all."""
    finished = start(REPOSITORY / "tests" / "distributed" / "workers" / name, *arguments, processes=processes).wait()
    assert finished.codes == [0] * processes, finished.output
    return finished


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
