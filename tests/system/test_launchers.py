"""One training by every launcher is one trace; whichever process of a launcher a signal hits, a checkpoint comes of it.

Each of DeepSpeed's launches costs some twenty seconds of imports: `make test-system` runs these.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import launchers
from tests.support.kills import newest_step
from tests.support.launchers import PROGRAMS, deepspeed, pretrain, torchrun
from tests.support.small_run import LIGHT, metrics, write_config

pytestmark = pytest.mark.system

#: No checkpoint but those that somebody asks for.
SETTINGS = (*LIGHT, "checkpoint.every_steps=1000", "evaluation.every_steps=0", "logging.console_every_steps=1000")
FIRST_STEPS = 6
#: As many as are killed one after another, and never the last one.
ENDLESS = "optim.total_steps=100000"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards)


def run_to_the_end(command: Sequence[object], run: Path) -> list[dict[str, object]]:
    job = launchers.start(command, run)
    assert job.wait() == 0, job.output
    return metrics(run)


def test_two_processes_by_deepspeed_and_by_torchrun_are_one_trace(tmp_path: Path, config: Path) -> None:
    traces = [
        run_to_the_end([*launcher, *pretrain(config, run, "--steps", FIRST_STEPS, *SETTINGS)], run)
        for launcher, run in (
            (deepspeed("--num_gpus", 2), tmp_path / "deepspeed"),
            (torchrun("--nproc-per-node", 2), tmp_path / "torchrun"),
        )
    ]
    assert len(traces[0]) == FIRST_STEPS
    assert traces[0] == traces[1]


def test_one_process_by_deepspeed_by_torchrun_and_by_plain_python_are_one_trace(tmp_path: Path, config: Path) -> None:
    traces = [
        run_to_the_end([*launcher, *pretrain(config, run, "--steps", FIRST_STEPS, *SETTINGS)], run)
        for launcher, run in (
            (deepspeed("--num_gpus", 1), tmp_path / "deepspeed"),
            (torchrun("--nproc-per-node", 1), tmp_path / "torchrun"),
            ([PROGRAMS / "python"], tmp_path / "python"),
        )
    ]
    assert len(traces[0]) == FIRST_STEPS
    assert traces[0] == traces[1] == traces[2]


def test_a_hostfile_that_is_not_there_stops_the_job_where_deepspeed_would_go_on(tmp_path: Path, config: Path) -> None:
    command = deepspeed("--hostfile", tmp_path / "hots", "--num_gpus", 1)
    job = launchers.start([*command, *pretrain(config, tmp_path / "run")], tmp_path / "run")
    assert job.wait() == 78, job.output
    assert f"there is no hostfile {tmp_path / 'hots'}" in job.output
    assert not (tmp_path / "run").exists()


#: What a signal does to DeepSpeed's processes is not ours: the exit codes are theirs, so none is asked for.
HITS = [
    ("the runner", signal.SIGTERM),
    ("the runner", signal.SIGUSR1),
    ("the launcher", signal.SIGTERM),
    ("the launcher", signal.SIGUSR1),
    ("a rank", signal.SIGUSR1),
    ("our wrapper", signal.SIGTERM),
    ("our wrapper", signal.SIGUSR1),
]


def test_f16_a_signal_to_any_process_above_the_ranks_is_a_checkpoint_and_no_orphan(
    tmp_path: Path, config: Path
) -> None:
    """Eight lives of one run, each but the last ended by another signal to another process, are one unbroken run."""
    run, training = tmp_path / "run", [*SETTINGS, ENDLESS]
    for number, (who, hit) in enumerate(HITS):
        command = [*deepspeed("--num_gpus", 2), *pretrain(config, run, *training)]
        if who == "our wrapper":
            command = [PROGRAMS / "swinv2-scale", "launch", *command]
        before = len(metrics(run)) if number else 0
        job = launchers.start(command, run)
        job.wait_for_step(before + 3)
        pid = {
            "the runner": lambda job: job.process.pid,
            "our wrapper": lambda job: job.process.pid,
            "the launcher": lambda job: job.member("deepspeed.launcher.launch"),
            "a rank": lambda job: job.member("--local_rank=1"),
        }[who](job)
        os.kill(pid, hit)
        code = job.wait()
        if who == "our wrapper":
            assert code == 85, job.output
        assert newest_step(run) == len(metrics(run)) >= before + 3, (who, hit, job.output)
        assert "stopping after step" in job.output
    last = newest_step(run) + 2
    whole = run_to_the_end(
        [*torchrun("--nproc-per-node", 2), *pretrain(config, tmp_path / "whole", "--steps", last, *training)],
        tmp_path / "whole",
    )
    assert (
        run_to_the_end([*deepspeed("--num_gpus", 2), *pretrain(config, run, "--steps", last, *training)], run) == whole
    )


@pytest.mark.parametrize("hit", [signal.SIGTERM, signal.SIGUSR1])
def test_f16_a_signal_to_torchruns_agent_is_a_checkpoint_and_no_orphan(
    tmp_path: Path, config: Path, hit: signal.Signals
) -> None:
    run = tmp_path / "run"
    job = launchers.start([*torchrun("--nproc-per-node", 2), *pretrain(config, run, *SETTINGS, ENDLESS)], run)
    job.wait_for_step(3)
    os.kill(job.process.pid, hit)
    job.wait()
    assert newest_step(run) == len(metrics(run)), job.output


def test_torchruns_second_attempt_goes_on_from_the_last_checkpoint(tmp_path: Path, config: Path) -> None:
    # The store of torchrun's agent outlives an attempt: its ranks must not look for those of the first.
    run, training = (
        tmp_path / "run",
        (*LIGHT, "checkpoint.every_steps=5", "evaluation.every_steps=0", "optim.total_steps=60"),
    )
    command = [*torchrun("--nproc-per-node", 2, "--max-restarts", 1), *pretrain(config, run, *training)]
    job = launchers.start(command, run)
    job.wait_for_step(12)
    agent = job.process.pid
    ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert [row["step"] for row in metrics(run)] == list(range(1, 61))
    assert (run / "lives.jsonl").read_text().count('{"started"') >= 2


def test_our_wrapper_reports_the_launchers_end_as_the_run_directory_has_it(tmp_path: Path, config: Path) -> None:
    # DeepSpeed's runner exits 0 when its launcher is killed by a signal.
    run = tmp_path / "run"
    command = [*deepspeed("--num_gpus", 1), *pretrain(config, run, *SETTINGS, ENDLESS)]
    job = launchers.start([PROGRAMS / "swinv2-scale", "launch", *command], run)
    job.wait_for_step(3)
    os.kill(job.member("deepspeed.launcher.launch"), signal.SIGUSR1)
    assert job.wait() == 85, job.output
