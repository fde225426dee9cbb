"""F18 and F19: a rank that is stopped, stuck, killed or cut off is named by the others, which end in time."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import Job, start_pretrain
from tests.support.small_run import LIGHT, metrics, write_config

STEP_TIMEOUT_S = 4
#: What is promised: so long after the fault no rank that waits is left.
IN_TIME_S = STEP_TIMEOUT_S + 10
#: For everything else, on a machine that others use.
DEADLINE_S = 120
HOST = socket.gethostname()
ENDLESS = (*LIGHT, "optim.total_steps=100000", "evaluation.every_steps=0", "checkpoint.every_steps=1000")


@dataclass
class Ended:
    """How a job took its fault.

    Attributes:
        codes: of the ranks; None for one that was stopped and remained.
        seconds: from the fault to the end of the last survivor.
    """

    run: Path
    codes: list[int | None]
    outputs: list[str]
    seconds: float

    def log(self, rank: int) -> str:
        return (self.run / "log" / f"rank-{rank}.log").read_text()

    @property
    def last_step(self) -> int:
        return int(metrics(self.run)[-1]["step"])


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop_loader(pid: int) -> None:
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        stop(int(worker))


#: What happens, and to which rank of two.
FAULTS: dict[str, tuple[Callable[[int], None], int]] = {
    "rank 0 stopped": (stop, 0),
    "rank 1 stopped": (stop, 1),
    "loader of rank 1 stopped": (stop_loader, 1),
    "rank 0 killed": (kill, 0),
    "rank 1 killed": (kill, 1),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Ended]:
    """All faults at once, each in a job of its own: nearly all of the time is waiting."""
    config = write_config(tmp_path_factory.mktemp("config"), shards)
    runs = {name: tmp_path_factory.mktemp("runs") / "run" for name in FAULTS}
    arguments = ("--config", config, *ENDLESS, f"cluster.step_timeout_s={STEP_TIMEOUT_S}")
    jobs = {name: start_pretrain("--run-dir", run, *arguments, processes=2) for name, run in runs.items()}
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    end = time.monotonic() + DEADLINE_S
    try:
        while len(seconds) < len(jobs):
            time.sleep(0.05)
            assert time.monotonic() < end, [[rank.output for rank in job.ranks] for job in jobs.values()]
            for name, job in jobs.items():
                if name not in started and has_reached(runs[name], 3, [rank.poll() for rank in job.ranks]):
                    fault, hit = FAULTS[name]
                    fault(job.ranks[hit].pid)
                    started[name] = time.monotonic()
                elif name in started and name not in seconds and not survivors(name, job):
                    seconds[name] = time.monotonic() - started[name]
        codes = {name: [rank.poll() for rank in job.ranks] for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            for rank in job.ranks:
                rank.send_signal(signal.SIGKILL)
    return {
        name: Ended(runs[name], codes[name], [rank.output for rank in job.ranks], seconds[name])
        for name, job in jobs.items()
    }


def survivors(name: str, job: Job) -> list[int]:
    """The ranks that have yet to end by themselves."""
    fault, hit = FAULTS[name]
    return [number for number, rank in enumerate(job.ranks) if rank.poll() is None and (number, fault) != (hit, stop)]


def has_reached(run: Path, step: int, codes: list[int | None]) -> bool:
    assert set(codes) == {None}, "a rank ended before anything happened to it"
    path = run / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= step


@pytest.mark.parametrize("hit", [0, 1])
def test_f18_the_survivor_of_a_silent_rank_ends_with_75_in_time(ended: dict[str, Ended], hit: int) -> None:
    job = ended[f"rank {hit} stopped"]
    assert job.codes[1 - hit] == 75, job.outputs
    assert job.codes[hit] is None
    assert job.seconds < IN_TIME_S


@pytest.mark.parametrize("hit", [0, 1])
def test_f18_it_says_which_rank_on_which_host_at_which_step_in_which_phase(ended: dict[str, Ended], hit: int) -> None:
    job = ended[f"rank {hit} stopped"]
    said = re.search(
        rf"error: rank {1 - hit} on {HOST} has been at step (\d+) \((?:training|waiting for samples)\) for \d+ s: "
        rf"rank {hit} on {HOST} no longer answers, last seen at (?:step \d+|the start) \([a-z ]+\)\n",
        job.outputs[1 - hit],
    )
    assert said, job.outputs
    # Rank 0 writes a row when the step is over; a rank may be one ahead of that.
    assert job.last_step <= int(said[1]) <= job.last_step + 2
    assert "exit code 75" in job.outputs[1 - hit]


@pytest.mark.parametrize("hit", [0, 1])
def test_f18_its_log_has_the_stacks_of_all_its_threads(ended: dict[str, Ended], hit: int) -> None:
    log = ended[f"rank {hit} stopped"].log(1 - hit)
    stacks = log[log.index("the stacks of all threads") :]
    assert "in train_step" in stacks or "in _boundary" in stacks  # where the main thread waits
    assert "watchdog.py" in stacks
    assert stacks.count("hread 0x") >= 3


def test_f18_the_run_directory_says_who_was_missing_unless_the_one_that_writes_it_was(ended: dict[str, Ended]) -> None:
    lives = [json.loads(line) for line in (ended["rank 1 stopped"].run / "lives.jsonl").read_text().splitlines()]
    assert [life.get("exit_code") for life in lives] == [None, 75]
    assert f"rank 1 on {HOST} no longer answers" in lives[1]["why"]
    assert len((ended["rank 0 stopped"].run / "lives.jsonl").read_text().splitlines()) == 1


def test_f18_a_rank_stuck_in_its_loader_is_named_with_its_phase_by_itself_and_by_the_other(
    ended: dict[str, Ended],
) -> None:
    job = ended["loader of rank 1 stopped"]
    assert job.codes == [75, 75], job.outputs
    assert job.seconds < IN_TIME_S
    for output in job.outputs:
        assert re.search(rf"rank 1 on {HOST} is still at step \d+ \(waiting for samples\)", output), output


@pytest.mark.parametrize("hit", [0, 1])
def test_f18_the_survivor_of_a_killed_rank_names_it_beside_what_the_backend_said(
    ended: dict[str, Ended], hit: int
) -> None:
    job = ended[f"rank {hit} killed"]
    assert job.codes[1 - hit] == 75, job.outputs
    assert job.codes[hit] == -signal.SIGKILL
    said = job.outputs[1 - hit]
    assert re.search(rf"rank {hit} on {HOST} no longer answers, last seen at (step \d+|the start) \(", said), said
    # A loader's worker that outlives its rank keeps connections open; then the step's time is up first.
    assert re.search(r"Connection|Broken pipe|has been at step", said), said
    assert "Traceback" not in said
