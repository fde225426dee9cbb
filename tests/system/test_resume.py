"""A run that is stopped, killed or started again gives the numbers of a run that never was."""

import json
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from swinv2_scale.engine.checkpoint import find, verify
from tests.support.processes import pretrain, start_pretrain, wait_for_step
from tests.support.small_run import LIGHT, metrics, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    # One block a stage: every kind of randomness is there, and a hundred steps take half the time.
    fewer = {
        "depths: [2, 2]": "depths: [1, 1]",
        "total_steps: 30": "total_steps: 20",
        "every_steps: 7": "every_steps: 6",
    }
    return write_config(tmp_path_factory.mktemp("config"), shards, **fewer)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """20 steps by two processes: ZeRO-3 in bf16, checkpointing, accumulation, drop path, masks and augmentation on."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    finished = pretrain("--config", config, "--run-dir", run, processes=2)
    assert finished.code == 0, finished.output
    return run


def test_a_run_stopped_after_step_11_and_resumed_is_the_unbroken_run_bit_for_bit(
    tmp_path: Path, config: Path, unbroken: Path
) -> None:
    arguments = ("--config", config, "--run-dir", tmp_path / "run")
    stopped = pretrain(*arguments, "--steps", 11, processes=2)
    assert stopped.code == 0, stopped.output
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 12))
    resumed = pretrain(*arguments, "--resume", "required", processes=2)
    assert resumed.code == 0, resumed.output
    assert "resuming from" in resumed.output
    assert metrics(tmp_path / "run") == metrics(unbroken)
    _assert_same_tensors(tmp_path / "run", unbroken)


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_one_row_a_step(
    tmp_path: Path, config: Path, unbroken: Path
) -> None:
    arguments = ("--config", config, "--run-dir", tmp_path / "run")
    job = start_pretrain(*arguments, processes=2)
    wait_for_step(tmp_path / "run", 6, job)
    while not (tmp_path / "run" / "checkpoints" / "step-00000006").exists():  # it is written behind the training
        assert all(rank.poll() is None for rank in job.ranks), job.wait().output
        time.sleep(0.02)
    job.ranks[1].send_signal(signal.SIGKILL)
    killed = job.wait()
    assert killed.codes[0] == 75, killed.output
    assert "lost another rank" in killed.outputs[0]
    assert "Traceback" not in killed.outputs[0]
    # A line cut in the middle is what a power cut leaves.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    resumed = pretrain(*arguments, "--steps", 15, processes=2)
    assert resumed.code == 0, resumed.output
    assert "step-00000006" in resumed.output
    assert metrics(tmp_path / "run") == metrics(unbroken)[:15]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_f16_a_signal_to_one_rank_saves_and_stops_all_with_85(
    tmp_path: Path, config: Path, unbroken: Path, number: signal.Signals
) -> None:
    arguments = ("--config", config, "--run-dir", tmp_path / "run")
    job = start_pretrain(*arguments, processes=2)
    wait_for_step(tmp_path / "run", 3, job)
    job.ranks[1].send_signal(number)
    job.ranks[1].send_signal(number)  # schedulers repeat themselves
    stopped = job.wait()
    assert stopped.code == 85, stopped.output
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert metrics(tmp_path / "run") == metrics(unbroken)[:step]


def test_f16_signals_while_a_checkpoint_is_written_stop_the_run_at_a_whole_one(
    tmp_path: Path, config: Path, unbroken: Path
) -> None:
    run = tmp_path / "run"
    job = start_pretrain("--config", config, "--run-dir", run, "checkpoint.every_steps=2", processes=2)
    while not list((run / "checkpoints").glob(".part-*/step-*/*")):
        assert all(rank.poll() is None for rank in job.ranks), job.wait().output
        time.sleep(0.001)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        for rank in job.ranks:
            rank.send_signal(number)
    stopped = job.wait()
    assert stopped.code == 85, stopped.output
    newest = find(run / "checkpoints")[0]
    verify(newest)
    assert metrics(run) == metrics(unbroken)[: newest.step]


def test_f16_a_job_under_slurm_saves_before_its_time_is_over(tmp_path: Path, config: Path) -> None:
    end, grace_s = int(time.time()) + 40, 32  # the first step needs the rest
    arguments = ("--config", config, "--run-dir", tmp_path / "run", *LIGHT)
    endless = (f"cluster.grace_s={grace_s}", "optim.total_steps=1000000", "evaluation.every_steps=0")
    job = start_pretrain(*arguments, *endless, processes=2, SLURM_JOB_END_TIME=str(end))
    stopped = job.wait()
    assert stopped.code == 85, stopped.output
    assert time.time() < end
    assert "the job's time ends at" in stopped.output


def test_typed_again_a_finished_run_says_so_and_changes_nothing(config: Path, unbroken: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and "log" not in path.parts
    }
    again = pretrain("--config", config, "--run-dir", unbroken, processes=2)
    assert again.code == 0
    assert "finished" in again.output
    assert "--run-dir" in again.output
    changed = {path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert changed <= {unbroken / ".lock"}


def test_f09_one_process_reads_the_same_global_batches_as_two(tmp_path: Path, config: Path, unbroken: Path) -> None:
    alone = pretrain("--config", config, "--run-dir", tmp_path / "run", "--steps", 6)
    assert alone.code == 0, alone.output
    ours, theirs = metrics(tmp_path / "run"), metrics(unbroken)[:6]
    assert [row["data_digest"] for row in ours] == [row["data_digest"] for row in theirs]
    assert [row["lr"] for row in ours] == [row["lr"] for row in theirs]
    # Same samples, same draws: what differs is the order of additions, in bf16 a relative 2**-8 each.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-2)


def test_the_run_directory_holds_what_the_readme_lists(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    lives = [json.loads(line) for line in (unbroken / "lives.jsonl").read_text().splitlines()]
    assert [(life.get("from_step"), life.get("exit_code"), life.get("step")) for life in lives[:2]] == [
        (0, None, None),
        (None, 0, 20),
    ]
    assert {"config.yaml", "metrics.jsonl", "lives.jsonl", "tensorboard", "panels", "checkpoints", "log"} <= names
    assert sorted(path.name for path in (unbroken / "log").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert [path.name for path in sorted((unbroken / "panels").iterdir())] == [
        f"step-{step:08d}.png" for step in (10, 20)
    ]
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20]
    assert {"step_seconds", "data_seconds", "images_per_second"} <= rows[0].keys()
    # Retention: the newest three.
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (12, 18, 20)
    ]


def _assert_same_tensors(run: Path, other: Path) -> None:
    """Weights, float32 masters and Adam moments of the last checkpoint, to the bit."""
    from swinv2_scale.engine.consolidate import ALLOWED_CLASSES

    folder = Path("checkpoints") / "step-00000020"
    names = sorted(path.name for path in (other / folder).glob("*.pt"))
    assert len(names) == 6  # model, optimizer and random states of each rank
    for name in names:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            ours, theirs = (torch.load(root / folder / name, weights_only=True) for root in (run, other))
        assert _tensors(ours), name
        for one, two in zip(_tensors(ours), _tensors(theirs), strict=True):
            assert torch.equal(one, two)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def test_f10_uneven_shards_smaller_than_a_batch_keep_the_ranks_in_step(tmp_path: Path, config: Path) -> None:
    samples = fashion_mnist("train")
    for number, size in enumerate((3, 1, 7, 11, 2)):
        write_shards(islice(samples, size), tmp_path / f"shards-{number}", samples_per_shard=size, made_by="a test")
    # 24 samples, 16 a step: the second step begins a new epoch in its middle.
    arguments = (f"data.train={tmp_path}/shards-*/*.tar", "data.num_workers=2", "optim.total_steps=7", *LIGHT)
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *arguments, processes=2)
    assert finished.code == 0, finished.output
    assert [row["samples_seen"] for row in metrics(tmp_path / "run")] == [16 * step for step in range(1, 8)]
