"""Real checkpoints of real processes: read while they appear, damaged, in the way, or not to be written at all."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.checkpoint import Checkpoint, manifest_text
from swinv2_scale.errors import CheckpointError
from tests.support.processes import REPOSITORY, Finished, pretrain, run_worker, start, start_pretrain, wait_for_step
from tests.support.small_run import LIGHT, metrics, write_config

SAVES = REPOSITORY / "tests/distributed/workers/traced_saves.py"
#: Both ranks have files to write.
SHARED = (*LIGHT, "engine.zero_stage=3", "evaluation.every_steps=0", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder in which two ranks saved steps 1 to 20, two of which stay, and what a reader saw all the while."""
    root = tmp_path_factory.mktemp("saved")
    (root / "disk").mkdir()
    folder = root / "disk/run/checkpoints"
    job = start(SAVES, root / "disk", root / "record", 1, 20, 2, processes=2)
    newest = [0]
    while any(rank.poll() is None for rank in job.ranks):
        found = checkpoint.find(folder)
        newest.append(found[0].step if found else 0)
        for candidate in found:
            try:
                checkpoint.verify(candidate)
            except CheckpointError:
                # Deleted under the reader's eyes: gone as a whole, and never the newest.
                assert not candidate.path.exists()
                assert candidate != found[0]
    finished = job.wait()
    assert finished.code == 0, finished.output
    return folder, newest


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """A run of two ranks at step 4, with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("trained") / "run"
    finished = pretrain("--config", config, "--run-dir", run, "--steps", 4, *SHARED, processes=2)
    assert finished.code == 0, finished.output
    return run


def steps(folder: Path) -> list[int]:
    """Of the whole checkpoints, newest first."""
    return [found.step for found in checkpoint.find(folder) if is_whole(found)]


def is_whole(candidate: Checkpoint) -> bool:
    try:
        checkpoint.verify(candidate)
    except CheckpointError:
        return False
    return True


def assert_refused(finished: Finished, code: int, *fragments: str) -> None:
    assert finished.code == code, finished.output
    assert "Traceback" not in finished.output
    for fragment in fragments:
        assert fragment in finished.output, f"{fragment!r} is not in:\n{finished.output}"


def test_f02_a_reader_that_never_sleeps_sees_only_whole_checkpoints_and_never_an_older_one(
    saved: tuple[Path, list[int]],
) -> None:
    folder, newest = saved
    assert newest == sorted(newest)
    assert len(newest) > 20
    assert len(set(newest)) > 2  # it looked while they appeared
    assert steps(folder) == [20, 19]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange(path: Path) -> None:
    """With the other rank's file, or the next one."""
    names = sorted(entry.name for entry in path.parent.iterdir())
    other = path.name.replace("rank_0_", "rank_1_") if "rank_0_" in path.name else names[names.index(path.name) - 1]
    content = path.read_bytes()
    shutil.copy(path.with_name(other), path)
    path.with_name(other).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "exchanged": exchange,
    "of step 19": lambda path: shutil.copy(path.parent.with_name("step-00000019") / path.name, path),
}


def test_f03_any_damage_to_any_file_of_any_rank_is_found_by_all_ranks_and_said(
    tmp_path: Path, saved: tuple[Path, list[int]]
) -> None:
    folder, _ = saved
    names = sorted(path.name for path in (folder / "step-00000020").iterdir())
    assert len(names) == 8  # model, optimizer and random states of two ranks; state.json, manifest.json
    damaged: dict[str, str] = {}
    for name in names:
        for damage, spoil in DAMAGES.items():
            case = f"{name} {damage}"
            shutil.copytree(folder, tmp_path / case)
            path = tmp_path / case / "step-00000020" / name
            before = path.read_bytes()
            spoil(path)
            if path.exists() and path.read_bytes() == before:  # random states that nobody drew from
                shutil.rmtree(tmp_path / case)
            else:
                damaged[case] = name
    assert len(damaged) > 40
    finished = run_worker("verdicts.py", tmp_path, processes=2)
    for output in finished.outputs:
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        assert json.loads(line.removeprefix("RESULT ")) == dict.fromkeys(damaged, "step-00000019")
    said = finished.outputs[0].splitlines()
    for case, name in damaged.items():
        whole = tmp_path / case / "step-00000020"
        reasons = [line for line in said if str(whole) in line]
        assert len(reasons) == 1, reasons
        if name != "manifest.json" and "exchanged" not in case:
            expected = {"deleted": "No such file"}.get(case.removeprefix(f"{name} "), "its manifest says")
            assert f"falling back to the one before: {whole / name}" in reasons[0]
            assert expected in reasons[0]


def test_f03_a_manifest_of_which_any_byte_is_changed_is_none(tmp_path: Path, saved: tuple[Path, list[int]]) -> None:
    shutil.copytree(saved[0] / "step-00000020", tmp_path / "step-00000020")
    manifest = tmp_path / "step-00000020/manifest.json"
    good, whole = manifest.read_bytes(), checkpoint.read(tmp_path / "step-00000020")
    rng = random.Random(0)
    for position in range(len(good)):
        changed = good[position] ^ 1 << rng.randrange(8)
        manifest.write_bytes(good[:position] + bytes([changed]) + good[position + 1 :])
        try:
            found = checkpoint.read(tmp_path / "step-00000020")
        except CheckpointError:
            continue
        assert found == whole, position  # a blank that became another one


def test_f04_what_one_rank_alone_cannot_load_ends_all_ranks_with_its_reason(
    tmp_path: Path, config: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for found in checkpoint.find(tmp_path / "run/checkpoints"):
        (found.path / "random_states_rank_00001.pt").write_bytes(b"nothing that torch wrote")
        records = [checkpoint.FileRecord(r.name, *size_and_hash(found.path / r.name)) for r in found.files]
        (found.path / "manifest.json").write_text(manifest_text(found.step, 2, records))
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", *SHARED, processes=2)
    assert_refused(finished, 65, "cannot read", "random_states_rank_00001.pt")


def size_and_hash(path: Path) -> tuple[int, str]:
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def test_f05_a_write_that_fails_on_one_rank_ends_all_and_leaves_the_older_checkpoints(
    tmp_path: Path, config: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    job = start_pretrain("--config", config, "--run-dir", run, *SHARED, processes=2)
    wait_for_step(run, 5, job)
    resource.prlimit(job.ranks[1].pid, resource.RLIMIT_FSIZE, (12_000, 12_000))  # its log is smaller, its shard larger
    finished = job.wait()
    assert_refused(finished, 73, "rank 1 failed", "File too large")
    whole = steps(run / "checkpoints")
    assert whole[-2:] == [4, 2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in reversed(whole)]
    again = pretrain("--config", config, "--run-dir", run, *SHARED, "--steps", 8, processes=2)
    assert again.code == 0, again.output
    assert f"step {whole[0]}, every file verified" in again.output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root, and root may write anywhere else")
def test_f05_a_file_system_that_became_read_only_ends_the_run_with_73(
    tmp_path: Path, config: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = run / "checkpoints"
    folder.rename(run / "before")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        shutil.copytree(run / "before", folder, dirs_exist_ok=True)
        job = start_pretrain("--config", config, "--run-dir", run, *SHARED, "checkpoint.every_steps=3")
        wait_for_step(run, 5, job)
        while subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True).returncode:
            time.sleep(0.01)  # a file was open for writing
        finished = job.wait()
        assert_refused(finished, 73, "Read-only file system")
        assert steps(folder)[-2:] == [4, 2]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_f17_killed_in_a_save_that_outlasts_the_grace_the_run_goes_on_from_the_one_before(
    tmp_path: Path, config: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    job = start_pretrain("--config", config, "--run-dir", run, *SHARED, "checkpoint.every_steps=4", processes=2)
    while not any((run / "checkpoints").glob(".part-*/step-00000008")):
        assert all(rank.poll() is None for rank in job.ranks), job.wait().output
        time.sleep(0.002)
    job.ranks[1].send_signal(signal.SIGSTOP)  # so long does its disk take
    job.ranks[0].send_signal(signal.SIGTERM)
    time.sleep(1)  # the grace
    for rank in job.ranks:
        rank.send_signal(signal.SIGKILL)
    assert job.wait().codes == [-signal.SIGKILL] * 2
    assert steps(run / "checkpoints") == [4, 2]
    again = pretrain("--config", config, "--run-dir", run, *SHARED, "--steps", 9, processes=2)
    assert again.code == 0, again.output
    assert "step 4, every file verified" in again.output
    assert [row["step"] for row in metrics(run)] == list(range(1, 10))
    assert not list((run / "checkpoints").glob(".part-*"))


def test_f25_damaged_checkpoints_never_push_a_whole_one_out(tmp_path: Path, saved: tuple[Path, list[int]]) -> None:
    shutil.copytree(saved[0], tmp_path / "disk/run/checkpoints")
    folder = tmp_path / "disk/run/checkpoints"
    flip(folder / "step-00000020/state.json")
    (folder / "step-00000018").mkdir()  # one that never got a manifest
    run_worker("traced_saves.py", tmp_path / "disk", tmp_path / "record", 21, 21, 2, processes=1)
    assert steps(folder) == [21, 19]
    flip(folder / "step-00000021/state.json")
    run_worker("traced_saves.py", tmp_path / "disk", tmp_path / "record", 22, 23, 2, processes=1)
    assert steps(folder) == [23, 22]


def test_f27_the_order_is_the_manifests_whatever_the_clock_said(tmp_path: Path, saved: tuple[Path, list[int]]) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    for age, found in enumerate(checkpoint.find(tmp_path / "checkpoints")):
        for path in (found.path, *found.path.iterdir()):
            os.utime(path, (1e9 + age * 1e6,) * 2)
    times = {found.step: found.path.stat().st_mtime for found in checkpoint.find(tmp_path / "checkpoints")}
    assert times[19] > times[20]
    assert checkpoint.open_run_or_checkpoint(tmp_path).step == 20
