"""Damaged samples in a real training: stopped at, or replaced and listed, alike for any split and after kills."""

import json
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.data.shards.manifest import INDEX_ENTRY
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from tests.support.processes import Finished, Job
from tests.support.processes import start_pretrain as start_job
from tests.support.small_run import LIGHT, metrics, write_config

#: (shard, sample) whose bytes are damaged; 5 of 200.
DAMAGED = {(0, 3), (1, 0), (1, 24), (5, 11), (7, 7)}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photographs in eight shards, two epochs of which are 25 steps of 16."""
    folder = tmp_path_factory.mktemp("broken") / "train"
    write_shards(islice(fashion_mnist("train"), 200), folder, samples_per_shard=25, made_by="a test")
    for shard, sample in DAMAGED:
        flip(folder, shard, sample)
    return folder


def pretrain(*arguments: object, processes: int = 1) -> Finished:
    return start_pretrain(*arguments, processes=processes).wait()


def start_pretrain(*arguments: object, processes: int = 1) -> Job:
    return start_job(*arguments, *LIGHT, processes=processes)


def flip(folder: Path, shard: int, sample: int) -> None:
    tar = folder / f"{shard:06d}.tar"
    offset, length, _ = INDEX_ENTRY.unpack_from((folder / f"{tar.name}.index").read_bytes(), sample * INDEX_ENTRY.size)
    data = bytearray(tar.read_bytes())
    data[offset + length // 2] ^= 1
    tar.write_bytes(data)


@pytest.fixture
def config(tmp_path: Path, shards: Path, broken: Path) -> Path:
    return write_config(tmp_path, shards, **{"train: embedded:fashion-mnist/train": f"train: '{broken}/*.tar'"})


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.system
def test_f11_killed_and_resumed_on_another_split_a_run_replaces_the_same_samples(config: Path, tmp_path: Path) -> None:
    allow = ("data.max_quarantined_share=0.03", "optim.total_steps=26")
    whole = pretrain("--config", config, "--run-dir", tmp_path / "whole", *allow, processes=2)
    assert whole.code == 0, whole.output
    for epoch in (0, 1):
        assert f"epoch {epoch} is over: 195 samples read + 5 in quarantine, as many as the manifest has" in whole.output
    rows = listed(tmp_path / "whole")
    for epoch in (0, 1):
        names = {(int(Path(r["shard"]).stem), r["sample"]) for r in rows if r["epoch"] == epoch}
        assert names == DAMAGED
    assert all(row["use"] == "training" and "checksum" in row["cause"] for row in rows)
    assert [row["step"] for row in rows] == sorted(row["position"] // 16 + 1 for row in rows)

    run = tmp_path / "killed"
    job = start_pretrain("--config", config, "--run-dir", run, *allow, processes=2)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000014").exists():
        assert time.monotonic() < deadline
        assert job.ranks[0].poll() is None, job.ranks[0].output
        time.sleep(0.02)
    job.ranks[0].send_signal(signal.SIGKILL)
    job.wait()
    (run / "quarantine.jsonl").unlink()  # the checkpoint has the list too
    again = pretrain(
        "--config", config, "--run-dir", run, *allow, "data.num_workers=0", "data.micro_batch_size=2", processes=2
    )
    assert again.code == 0, again.output
    assert listed(run) == rows
    digests = [[row["data_digest"] for row in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert digests[0] == digests[1]


def test_f11_a_run_stops_when_more_is_damaged_than_it_allows_and_has_listed_all_it_met(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finished = pretrain("--config", config, "--run-dir", run, "data.max_quarantined_share=0.012", processes=2)
    assert finished.code == 65, finished.output
    assert finished.output.count("\nerror: ") == 1
    count = len(listed(run))
    assert count >= 3  # 1.2 % of 200 are two
    assert f"{count} of 200 training samples are in quarantine in epoch 0" in finished.output


def test_f11_a_missing_and_a_cut_shard_are_counted_before_the_run_or_put_into_quarantine(
    config: Path, tmp_path: Path, broken: Path
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for path in broken.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "000002.tar").unlink()
    cut = folder / "000006.tar"
    offset, _, _ = INDEX_ENTRY.unpack_from((folder / "000006.tar.index").read_bytes(), 20 * INDEX_ENTRY.size)
    cut.write_bytes(cut.read_bytes()[: offset + 700])
    pattern = f"data.train={folder}/{{000000..000007}}.tar"
    refused = pretrain("--config", config, "--run-dir", tmp_path / "a", pattern, "data.max_quarantined_share=0.1")
    assert refused.code == 65, refused.output
    assert "000002.tar is missing" in refused.output
    assert "000006.tar has " in refused.output
    options = ("--steps", 13, pattern, "data.max_quarantined_share=0.2")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "b", *options)
    assert finished.code == 0, finished.output
    # 25 of the missing shard, samples 20 to 24 of the one that was cut, and the five damaged ones.
    assert "epoch 0 is over: 165 samples read + 35 in quarantine, as many as the manifest has" in finished.output
    counts = {(int(Path(r["shard"]).stem), r["sample"]) for r in listed(tmp_path / "b") if r["epoch"] == 0}
    assert counts == DAMAGED | {(2, sample) for sample in range(25)} | {(6, sample) for sample in range(20, 25)}


def test_f11_damaged_validation_samples_count_for_nothing_and_are_listed_once(
    config: Path, tmp_path: Path, broken: Path, shards: Path
) -> None:
    overrides = (f"data.validation={broken}/00000[01].tar", f"data.train={shards}/fashion-mnist/train/*.tar")
    options = ("--steps", 4, "evaluation.samples=50", "evaluation.every_steps=2")
    run = tmp_path / "run"
    finished = pretrain("--config", config, "--run-dir", run, *options, *overrides, "data.max_quarantined_share=0.07")
    assert finished.code == 0, finished.output
    rows = listed(run)
    assert [(row["use"], row["sample"], row["step"]) for row in rows] == [
        ("validation", 3, 2),
        ("validation", 0, 2),
        ("validation", 24, 2),
    ]
    stopped = pretrain(
        "--config", config, "--run-dir", tmp_path / "b", *options, *overrides, "data.max_quarantined_share=0.05"
    )
    assert stopped.code == 65, stopped.output
    assert "3 of 50 validation samples are damaged" in stopped.output


def test_f11_the_limit_holds_for_an_epoch_that_begins_and_ends_in_one_step(
    config: Path, tmp_path: Path, broken: Path
) -> None:
    overrides = (f"data.train={broken}/000001.tar", "data.global_batch_size=25", "data.micro_batch_size=25")
    finished = pretrain(
        "--config", config, "--run-dir", tmp_path / "run", *overrides, "data.max_quarantined_share=0.05"
    )
    assert finished.code == 65, finished.output
    assert "2 of 25 training samples are in quarantine in epoch 0" in finished.output


def test_f11_a_validation_without_a_whole_sample_is_an_error_of_the_data(
    config: Path, tmp_path: Path, broken: Path, shards: Path
) -> None:
    folder = tmp_path / "validation"
    shutil.copytree(broken, folder)
    (folder / "000000.tar").unlink()
    overrides = (f"data.validation={folder}/*.tar", f"data.train={shards}/fashion-mnist/train/*.tar")
    options = ("--steps", 2, "evaluation.samples=20", "evaluation.every_steps=1", "data.max_quarantined_share=0.2")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *options, *overrides)
    assert finished.code == 65, finished.output
    assert "20 of 20 validation samples are damaged" in finished.output
    assert "Traceback" not in finished.output
