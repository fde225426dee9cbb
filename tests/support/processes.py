"""Start the ranks of a job as processes: what a launcher does, without its seconds of imports, nor each rank's."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
#: No job of a test takes longer on two busy cores; a hang fails instead of stopping CI. By then small_run.py's jobs
#: have ended by themselves, and said where they hung.
DEADLINE_S = 240


#: What a process of a job has in its environment: a launcher's variables, and what launchers.place makes of them.
OF_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


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


class Zygote:
    """The process that ranks are forked from (zygote.py), as the tests see it."""

    def __init__(self) -> None:
        # Threads that spin while they wait make steps ten times as long when other tests have the cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        command = [sys.executable, str(REPOSITORY / "tests" / "support" / "zygote.py")]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.logs = tempfile.TemporaryDirectory(prefix="ranks-")  # deleted when the tests are over
        self._pending = b""
        self._started: list[int] = []
        self.codes: dict[int, int] = {}  # exit codes of ranks that have ended

    def fork(self, **rank: object) -> int:
        """The process id of a new rank."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(rank).encode() + b"\n")
        self._process.stdin.flush()
        end = time.monotonic() + DEADLINE_S
        while not self._started:
            assert time.monotonic() < end, "no rank could be forked"
            self.listen(1.0)
        return self._started.pop()

    def listen(self, timeout_s: float) -> None:
        """Take in what the process has said, waiting for it at most so long."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        if not select.select([handle], [], [], timeout_s)[0]:
            return
        received = os.read(handle, 65536)
        assert received, f"the zygote ended with {self._process.wait()}"
        *lines, self._pending = (self._pending + received).split(b"\n")
        for words in (line.decode().split() for line in lines):
            if words[0] == "started":
                self._started.append(int(words[1]))
            elif words[0] == "ended":
                self.codes[int(words[1])] = int(words[2])


@lru_cache(maxsize=1)
def zygote() -> Zygote:
    return Zygote()


@dataclass(frozen=True)
class Rank:
    """One running process."""

    pid: int
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.pid not in zygote().codes:
            zygote().listen(0)
        return zygote().codes.get(self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@dataclass
class Job:
    """The running ranks of a job."""

    ranks: list[Rank]

    def wait(self, at_most_s: float = DEADLINE_S) -> Finished:
        """All ranks to their end; kills them at the deadline and fails."""
        end = time.monotonic() + at_most_s
        while any(rank.poll() is None for rank in self.ranks):
            zygote().listen(0.1)
            if time.monotonic() > end:
                for rank in self.ranks:
                    rank.send_signal(signal.SIGKILL)
                raise AssertionError("deadline reached:\n" + "\n".join(rank.output for rank in self.ranks))
        codes = [code for rank in self.ranks if (code := rank.poll()) is not None]
        return Finished(codes, [rank.output for rank in self.ranks])


def start(script: Path, *arguments: object, processes: int = 1, **variables: str) -> Job:
    """Start ``script`` as so many ranks of one job; one rank gets no launcher's environment at all.

    Args:
        variables: more of the ranks' environment.
    """
    # A test that ran a command in this process left what the command put there.
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    environment |= variables | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    port = free_port()
    logs = Path(tempfile.mkdtemp(dir=zygote().logs.name))
    ranks = []
    for rank in range(processes):
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = logs / f"rank-{rank}"
        log.touch()
        command = [str(script), *map(str, arguments)]
        pid = zygote().fork(command=command, environment=environment, folder=str(REPOSITORY), output=str(log))
        ranks.append(Rank(pid, log))
    return Job(ranks)


def pretrain(*arguments: object, processes: int = 1) -> Finished:
    """Run launch/pretrain.py to its end."""
    return start_pretrain(*arguments, processes=processes).wait()


def start_pretrain(*arguments: object, processes: int = 1, **variables: str) -> Job:
    return start(REPOSITORY / "launch" / "pretrain.py", *arguments, processes=processes, **variables)


def wait_for_step(run: Path, step: int, job: Job) -> None:
    """Until the run's metrics have the row of a step; fails if the job ends before."""
    path = run / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert all(rank.poll() is None for rank in job.ranks), job.wait().output
        time.sleep(0.02)


def run_worker(name: str, *arguments: object, processes: int) -> Finished:
    """Run a script of tests/distributed/workers/ as the ranks of a job; it has to succeed on all."""
    finished = start(REPOSITORY / "tests" / "distributed" / "workers" / name, *arguments, processes=processes).wait()
    assert finished.codes == [0] * processes, finished.output
    return finished


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
