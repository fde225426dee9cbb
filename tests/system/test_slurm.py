"""Jobs under a real Slurm of two nodes: stopped in every way it knows, requeued, judged by their run directory."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import newest_step
from tests.support.processes import REPOSITORY
from tests.support.slurm import DEADLINE_S, Slurm, is_installed, slurm
from tests.support.small_run import LIGHT, metrics, write_config

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not is_installed(), reason="Slurm is not installed; tests/system/install.sh does that"),
]

OVERRIDES = (*LIGHT, "optim.total_steps=90", "checkpoint.every_steps=40")
#: The site of these tests: this interpreter. With an option of srun, so that judging goes through a step, too.
SITE = f"""
prepare() {{
    export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={REPOSITORY} DS_ACCELERATOR=cpu
}}
srun_options=(--label)
"""


@dataclass(frozen=True)
class Cluster:
    """Slurm, and a folder from which a configuration is submitted."""

    slurm: Slurm
    folder: Path
    config: Path

    def submit(self, run: Path, *words: object, command: str = "submit") -> str:
        """A job of one task on each of two nodes; its number."""
        return self.slurm.run(*self.submission(run, *words), "--parsable", cwd=self.folder)

    def submission(self, run: Path, *words: object) -> tuple[object, ...]:
        size = ("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 1)
        where = ("--run-dir", run, "--site", self.folder / "site.sh")
        return (sys.executable, "-m", "swinv2_scale", "submit", self.config, *size, *where, *words)

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"slurm-*-{job}.out"))

    def wait_for_steps(self, job: str, run: Path, number: int) -> None:
        """Until a running job has trained so many steps more."""
        self.slurm.wait(job, "RUNNING")
        goal, end = num_steps(run) + number, time.monotonic() + DEADLINE_S
        while num_steps(run) < goal:
            state = self.slurm.job(job)["JobState"]
            assert state == "RUNNING", f"{state}: {self.log(job)}"
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.1)

    def wait_for_requeue(self, job: str, restarts: int) -> None:
        self.slurm.wait(job, "PENDING", "RUNNING", restarts=restarts)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "site.sh").write_text(SITE)
    with slurm() as it:
        yield Cluster(it, folder, write_config(folder, shards))


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.slurm.clear()


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def status(run: Path) -> dict[str, Any]:
    """What ``swinv2-scale status`` says of a run."""
    from swinv2_scale.engine.status import read_status

    found: dict[str, Any] = json.loads(json.dumps(read_status(run).to_json()))
    return found


def reason(life: dict[str, Any]) -> str:
    """Why it ended, whichever rank saw it first."""
    return str(life["why"]).partition(" (rank")[0]


def pid_of_rank_zero(run: Path) -> int:
    found = re.match(r"pid (\d+)", (run / ".lock").read_text())
    assert found
    return int(found[1])


def ranks_of(run: Path) -> list[int]:
    """Processes that train in a run directory, from their first moment on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            words = path.read_bytes().split(b"\0")
            if Path(words[0].decode()).name.startswith("python") and str(run).encode() in words:
                found.append(int(path.parent.name))
    return found


def test_f16_five_lives_of_a_job_give_the_loss_curve_of_an_unbroken_run(cluster: Cluster, tmp_path: Path) -> None:
    run, slurm = tmp_path / "run", cluster.slurm
    job = cluster.submit(run, *OVERRIDES)

    cluster.wait_for_steps(job, run, 10)
    assert status(run)["state"] == "running"
    # Slurm 22.05 doesn't say when the job will be killed; our script finds out.
    environment = Path(f"/proc/{pid_of_rank_zero(run)}/environ").read_text().split("\0")
    ends = datetime.fromisoformat(slurm.job(job)["EndTime"]).timestamp()
    assert f"SLURM_JOB_END_TIME={ends:.0f}" in environment
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # to the batch shell alone, which hands it on
    cluster.wait_for_requeue(job, restarts=1)
    assert newest_step(run) == num_steps(run)

    cluster.wait_for_steps(job, run, 10)
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    preemptor = slurm.run("sbatch", "--parsable", *urgent)
    cluster.wait_for_requeue(job, restarts=2)
    assert newest_step(run) == num_steps(run)
    slurm.wait(preemptor, "COMPLETED")

    cluster.wait_for_steps(job, run, 10)
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for_requeue(job, restarts=3)
    assert newest_step(run) == num_steps(run)

    cluster.wait_for_steps(job, run, 10)
    os.kill(pid_of_rank_zero(run), signal.SIGKILL)
    cluster.wait_for_requeue(job, restarts=4)

    slurm.wait(job, "COMPLETED")
    found = status(run)
    assert found["state"] == "finished"
    assert [life["exit_code"] for life in found["lives"]] == [85, 85, 85, None, 0], cluster.log(job)
    script = (sys.executable, REPOSITORY / "launch" / "pretrain.py", "--config", cluster.config)
    slurm.run("srun", "--nodes=2", "--gpus-per-node=1", *script, "--run-dir", tmp_path / "unbroken", *OVERRIDES)
    assert metrics(run) == metrics(tmp_path / "unbroken")


def test_f16_a_recipes_stages_run_one_after_another_though_the_first_is_requeued(cluster: Cluster) -> None:
    slurm, folder = cluster.slurm, cluster.folder
    (folder / "x.yaml").write_text("stages:\n  - {name: a, config: small.yaml}\n  - {name: b, config: small.yaml}\n")
    first, second = folder / "runs" / "x" / "01-a", folder / "runs" / "x" / "02-b"
    recipe = (sys.executable, "-m", "swinv2_scale", "recipe")
    size = ("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 1, "--site", folder / "site.sh")
    training = (*LIGHT, "optim.total_steps=50")
    said = slurm.run(*recipe, "submit", "x.yaml", *size, *training, cwd=folder)
    jobs = re.findall(r": job (\d+)", said)
    assert len(jobs) == 2, said

    def states() -> list[str]:
        found = json.loads(slurm.run(*recipe, "status", "x.yaml", "--json", *training, cwd=folder))
        return [stage["state"] for stage in found]

    cluster.wait_for_steps(jobs[0], first, 5)
    assert states() == ["running", "not started"]
    refused = slurm.try_to(*recipe, "submit", "x.yaml", *size, *training, cwd=folder)
    assert (refused.returncode, "a job is using" in refused.stderr) == (73, True)
    slurm.run("scancel", "--signal=USR1", jobs[0])  # to the tasks
    cluster.wait_for_requeue(jobs[0], restarts=1)
    assert slurm.job(jobs[1])["Reason"] == "Dependency"
    slurm.wait(jobs[0], "COMPLETED")
    assert [reason(life) for life in status(first)["lives"]] == ["SIGUSR1", ""]
    slurm.wait(jobs[1], "COMPLETED")
    assert states() == ["finished", "finished"]
    assert f"starting from {first}" in cluster.log(jobs[1])
    assert "launch/finetune.py" in status(second)["lives"][0]["command"][0]


def test_a_stage_that_fails_takes_those_that_wait_for_it_out_of_the_queue(cluster: Cluster) -> None:
    slurm, folder = cluster.slurm, cluster.folder
    (folder / "y.yaml").write_text("stages:\n  - {name: a, config: small.yaml}\n  - {name: b, config: small.yaml}\n")
    size = ("--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 1, "--site", folder / "site.sh")
    words = (*LIGHT, "data.train=nowhere/*.tar")
    said = slurm.run(sys.executable, "-m", "swinv2_scale", "recipe", "submit", "y.yaml", *size, *words, cwd=folder)
    first, second = re.findall(r": job (\d+)", said)
    assert slurm.wait(first, "FAILED")["ExitCode"] == "65:0", cluster.log(first)
    assert slurm.wait(second, "CANCELLED")["Restarts"] == "0"


def test_f16_a_time_limit_a_drained_node_and_a_cancelled_job_lose_nothing(cluster: Cluster, tmp_path: Path) -> None:
    run, slurm = tmp_path / "run", cluster.slurm
    job = cluster.submit(run, *LIGHT, "optim.total_steps=2000")
    cluster.wait_for_steps(job, run, 1)
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    cluster.wait_for_steps(job, run, 5)  # a drained node ends what it has begun
    # --signal=USR1@300 of the shipped file: four minutes before its end the job is due, within half a minute.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=4")
    cluster.wait_for_requeue(job, restarts=1)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert slurm.try_to("sinfo", "--noheader", "--nodes", "n2", "--format", "%T").stdout.strip() == "drained"
    assert slurm.job(job)["JobState"] == "PENDING"
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")

    cluster.wait_for_steps(job, run, 5)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    time.sleep(1)
    assert slurm.job(job)["JobState"] == "CANCELLED"  # our script didn't requeue it
    found = status(run)
    assert [life["exit_code"] for life in found["lives"]] == [85, 85]
    timed_out, cancelled = map(reason, found["lives"])
    assert timed_out == "SIGUSR1"
    # scancel tells the tasks and the script, whose own signal srun hands on; either may be the first.
    assert cancelled in ("SIGTERM", "SIGUSR1")
    assert newest_step(run) == num_steps(run) == found["checkpoint"]["step"]


def test_f16_a_signal_while_ranks_start_requeues_a_job_and_a_file_stops_it_for_good(
    cluster: Cluster, tmp_path: Path
) -> None:
    run, slurm = tmp_path / "run", cluster.slurm
    job = cluster.submit(run, *LIGHT, "optim.total_steps=2000")
    end = time.monotonic() + DEADLINE_S
    while len(ranks_of(run)) < 2:
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", job)
    assert num_steps(run) == 0
    cluster.wait_for_requeue(job, restarts=1)

    cluster.wait_for_steps(job, run, 5)
    slurm.run(sys.executable, "-m", "swinv2_scale", "stop", run)
    ended = slurm.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("85:0", "1")
    assert status(run)["state"] == "stopped"

    # Started again with less than it was begun for, it ends with what the run directory says, and isn't requeued.
    job = cluster.submit(run, *LIGHT, "optim.total_steps=2001", "model.drop_path_rate=0.3", "model.num_heads=[1,2]")
    ended = slurm.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("78:0", "0")
    assert "another configuration" in status(run)["reason"]


def test_a_wrong_allocation_ends_with_78_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """By hand: the shipped files as they are, from the repository's folder."""
    size = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    by_hand = ("sbatch", "--parsable", *size, f"--output={cluster.folder}/slurm-x-%j.out")
    script = (REPOSITORY / "launch" / "slurm" / "pretrain.sbatch", cluster.config, tmp_path / "run")
    job = cluster.slurm.run(*by_hand, *script, "cluster.world_size=16", cwd=REPOSITORY)
    ended = cluster.slurm.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("78:0", "0"), cluster.log(job)
    assert "cluster.world_size is 16, the launcher started 2 processes" in cluster.log(job)


def test_a_misspelled_key_is_found_before_anything_is_queued(cluster: Cluster, tmp_path: Path) -> None:
    refused = cluster.slurm.try_to(*cluster.submission(tmp_path / "run", "optim.lrr=1"), cwd=cluster.folder)
    assert refused.returncode == 78
    assert "did you mean optim.lr?" in refused.stderr
    assert cluster.slurm.run("squeue", "--noheader") == ""
    assert not (tmp_path / "run").exists()
