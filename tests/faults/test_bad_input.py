"""Bad input: one clear typed error, the documented exit code, no traceback, nothing lost."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from swinv2_scale.engine.checkpoint import FileRecord, find, manifest_text
from tests.support.processes import Finished, pretrain
from tests.support.small_run import metrics, write_config


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    return write_config(tmp_path, shards)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, Path]:
    """(configuration, run directory) of a run at step 4 of 30, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, shards, **{"every_steps: 7": "every_steps: 2"})
    finished = pretrain("--config", config, "--run-dir", folder / "run", "--steps", 4)
    assert finished.code == 0, finished.output
    return config, folder / "run"


def assert_refused(finished: Finished, code: int, *fragments: str) -> None:
    assert finished.code == code, finished.output
    assert "Traceback" not in finished.output
    assert len(re.findall("^error: ", finished.output, re.MULTILINE)) == 1, finished.output
    for fragment in fragments:
        assert fragment in finished.output, f"{fragment!r} is not in:\n{finished.output}"


def test_a_misspelled_key_names_file_line_and_the_nearest_key(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("warmup_steps: 5", "warmup_step: 5").replace("lr: 2.0e-3", "lerning_rate: 1")
    config.write_text(text)
    line = text.splitlines().index("  warmup_step: 5") + 1
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run")
    assert_refused(finished, 78, f"{config}:{line}", "optim.warmup_step:", "optim.warmup_steps", "optim.lerning_rate")
    assert "did you mean optim.lr?" in finished.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("optim.lr=many", ["optim.lr", "many", "command line"]),
        ("data.micro_batch_size=5", ["data.micro_batch_size", "[1, 2, 4, 8] do"]),
        ("model.image_size=50", ["model.image_size", "48 and 56"]),
        ("model.window_size=64", ["model.window_size", "[1, 2, 4, 8]"]),
        ("model.variant=tinny", ["model.variant", "did you mean tiny"]),
        ("--sead=3", ["--sead"]),
    ],
)
def test_values_that_do_not_fit_are_refused_with_those_that_do(
    config: Path, tmp_path: Path, override: str, fragments: list[str]
) -> None:
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", override)
    assert_refused(finished, 78, *fragments)


def test_a_global_batch_that_the_ranks_cannot_share_is_refused_with_the_arithmetic(
    config: Path, tmp_path: Path
) -> None:
    overrides = ("data.global_batch_size=12", "data.micro_batch_size=4")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *overrides, processes=2)
    assert_refused(finished, 78, "4 x 2 processes = 8", "[1, 2, 3, 6]")


def test_fewer_processes_than_the_cluster_section_asks_for_are_refused(config: Path, tmp_path: Path) -> None:
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", "cluster.world_size=16")
    assert_refused(finished, 78, "cluster.world_size is 16", "1 processes", "hostfile")


def test_no_shards_match(config: Path, tmp_path: Path) -> None:
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", f"data.train={tmp_path}/none-*.tar")
    assert_refused(finished, 65, f"no shards match '{tmp_path}/none-*.tar'")


def test_f11_a_missing_and_a_truncated_shard_are_named_on_every_rank(
    config: Path, tmp_path: Path, shards: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards / "fashion-mnist" / "train", broken)
    os.truncate(broken / "000003.tar", 12345)
    (broken / "000005.tar").unlink()
    pattern = f"{broken}/{{000000..000007}}.tar"
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", f"data.train={pattern}", processes=2)
    assert_refused(finished, 65, "000003.tar has 12345 bytes", "000005.tar is missing")


def test_f11_a_byte_flipped_in_a_sample_stops_the_run_when_it_is_read(
    config: Path, tmp_path: Path, shards: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards / "fashion-mnist" / "train", broken)
    for tar in broken.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        for position in range(700, len(data), 20_000):  # about one sample in five
            data[position] ^= 1
        tar.write_bytes(data)
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", f"data.train={broken}/*.tar", processes=2)
    assert_refused(finished, 65, "is damaged: its checksum differs", "data.max_quarantined_share")


def test_fewer_samples_than_a_global_batch(config: Path, tmp_path: Path) -> None:
    overrides = ("data.global_batch_size=16000", "data.micro_batch_size=8000")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *overrides)
    assert_refused(finished, 65, "8000 samples", "16000")


def test_resume_required_with_nothing_to_resume(config: Path, tmp_path: Path) -> None:
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", "--resume", "required")
    assert_refused(finished, 65, "--resume required", "holds no checkpoint")


def test_a_new_run_never_overwrites_another(trained: tuple[Path, Path]) -> None:
    config, run = trained
    finished = pretrain("--config", config, "--run-dir", run, "--resume", "never")
    assert_refused(finished, 73, "holds a run at step 4")


def test_f07_a_run_directory_of_another_configuration_lists_what_may_change_and_what_not(
    trained: tuple[Path, Path],
) -> None:
    config, run = trained
    before = (run / "config.yaml").read_text()
    overrides = ("model.window_size=2", "optim.lr=1e-3", "data.num_workers=0")
    finished = pretrain("--config", config, "--run-dir", run, *overrides)
    assert_refused(
        finished,
        78,
        "model.window_size: was 4, now 2 - may not change",
        "optim.lr: was 0.002, now 0.001 - may change, changes the numbers",
        "data.num_workers: was 1, now 0 - may change",
    )
    assert (run / "config.yaml").read_text() == before


def test_f07_other_shards_on_resume_are_refused(trained: tuple[Path, Path], shards: Path) -> None:
    config, run = trained
    pattern = shards / "fashion-mnist" / "train" / "{000000..000006}.tar"
    finished = pretrain("--config", config, "--run-dir", run, f"data.train={pattern}")
    assert_refused(finished, 65, "training shards are not the ones")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = next((copy / "checkpoints" / "step-00000004").glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    finished = pretrain("--config", config, "--run-dir", copy, "--steps", 4)
    assert finished.code == 0, finished.output
    assert f"step-00000004 is damaged, falling back to the one before: {file}" in finished.output
    assert "resuming from" in finished.output
    assert "step-00000002" in finished.output
    assert metrics(copy) == metrics(run)


def test_with_no_whole_checkpoint_left_the_run_never_starts_over(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for file in copy.glob("checkpoints/*/state.json"):
        file.write_text("{}")
    finished = pretrain("--config", config, "--run-dir", copy)
    assert_refused(finished, 65, "none of the 2 checkpoints", "is whole")
    assert metrics(copy) == metrics(run)


def test_f13_a_hostile_checkpoint_runs_no_code(trained: tuple[Path, Path], tmp_path: Path) -> None:
    import hashlib
    import pickle

    config, run = trained
    copy, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(run, copy)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {canary}",)

    for found in find(copy / "checkpoints"):
        records = []
        for record in found.files:
            if record.name.endswith(".pt"):
                data = pickle.dumps(Payload())
                (found.path / record.name).write_bytes(data)
                record = FileRecord(record.name, len(data), hashlib.sha256(data).hexdigest())
            records.append(record)
        (found.path / "manifest.json").write_text(manifest_text(found.step, found.world_size, records))
    finished = pretrain("--config", config, "--run-dir", copy)
    assert_refused(finished, 65, "it is damaged, or holds more than tensors and plain data")
    assert not canary.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_space_left_keeps_the_older_checkpoints(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    options = ("--config", config, "--run-dir", run, "checkpoint.every_steps=3", "data.global_batch_size=8")
    # Room for one checkpoint of this model, not for two.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", run / "checkpoints"], check=True)
    try:
        finished = pretrain(*options, processes=2)
        assert_refused(finished, 73, "No space left", "step-00000006")
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
        rows = [row["step"] for row in metrics(run)]  # training went on while the save failed
        assert rows == list(range(1, len(rows) + 1))
        assert len(rows) >= 6
        roomier = ["mount", "-o", "remount,size=8m", run / "checkpoints"]
        subprocess.run(roomier, check=True)
        again = pretrain(*options, "--steps", 6, processes=2)
        assert again.code == 0, again.output
    finally:
        subprocess.run(["umount", run / "checkpoints"], check=True)


def test_an_unwritable_run_directory(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "file" / "run")
    assert_refused(finished, 73, "cannot write the run directory")


def test_a_training_that_stays_non_finite_stops_with_70(config: Path, tmp_path: Path) -> None:
    # So high a rate throws the weights out of float32's range within a few steps; no update with NaN is ever taken.
    overrides = ("optim.lr=1e36", "optim.warmup_steps=0", "optim.clip_grad_norm=0")
    overrides = (*overrides, "anomalies.max_skipped_steps=2", "anomalies.max_rewinds=0")
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *overrides)
    assert_refused(finished, 70, "3 updates in a row were refused, after 0 rewinds", "lower optim.lr")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [bool(row.get("skipped")) for row in rows[-3:]] == [True] * 3
