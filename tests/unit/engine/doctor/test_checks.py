"""The doctor's checks of one process, each against something that is really wrong."""

import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.cli.main import main
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.doctor import compiled, host, storage
from swinv2_scale.engine.doctor.findings import State
from swinv2_scale.errors import OutputError
from tests.support.small_run import write_config

#: No disk holds two checkpoints of this.
ENDLESS = ["model.embed_dim=65536", "model.num_heads=[2048,4096]"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    return write_config(tmp_path, shards)


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def checks(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks of the command, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--json", *map(str, words)])
    output = json.loads(capsys.readouterr().out)
    assert output["ready"] == (end.value.code == 0)
    return int(end.value.code or 0), {check["check"]: check for check in output["checks"]}


def test_one_process_without_launcher_is_ready_and_leaves_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = checks(capsys, config, "--run-dir", tmp_path / "new" / "run")
    assert code == 0, found
    assert found["network"]["found"] == "one process: nothing to compare, nothing to measure"
    assert not (tmp_path / "new").exists()


def test_it_says_something_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checks(capsys)
    assert code == 0
    assert {"versions", "accelerator", "memory", "/dev/shm"} <= set(found)  # noqa: S108
    assert "training data" not in found


def test_the_table_ends_with_one_line_of_verdict(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", str(config), "cluster.world_size=8", "--run-dir", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 78
    assert lines[-1].startswith("not ready: 1 problem (1 process, ")
    assert any("1 process on 1 node, but cluster.world_size is 8" in line for line in lines)


def test_a_configuration_that_is_wrong_is_one_of_the_problems(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checks(capsys, config, "optim.lrr=1")
    assert code == 78
    assert "optim.lrr: no such key" in found["configuration"]["found"]
    assert found["accelerator"]["state"] == "ok"


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").symlink_to(shards)
    config = write_config(tmp_path, tmp_path / "shards")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", shards / "fashion-mnist" / "train", copy], check=True)
    victim = sorted(copy.glob("*.tar"))[5]
    data = bytearray(victim.read_bytes())
    data[600] ^= 1  # in the first sample
    victim.write_bytes(data)
    code, found = checks(capsys, config, f"data.train={copy}/*.tar", "--run-dir", tmp_path / "run")
    assert code == 78
    assert victim.name in found["training data"]["found"]
    assert "checksum differs" in found["training data"]["found"]


def test_an_interface_that_is_not_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nope0")
    code, found = checks(capsys)
    assert code == 78
    assert "NCCL_SOCKET_IFNAME==nope0, but this node has " in found["network settings"]["found"]


@pytest.mark.parametrize("value", ["lo", "=lo", "^docker", "eth,lo"])
def test_interfaces_are_read_as_nccl_reads_them(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert host.look_at_network()[0].state is State.OK


def test_a_disk_without_room_for_what_is_offloaded_is_a_problem(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk = ["engine.offload.optimizer_states=nvme", f"engine.offload.nvme_dir={tmp_path}/not/yet"]
    _, found = checks(capsys, config, *on_disk)
    assert f"nvme_dir {tmp_path}/not/yet has " in found[storage.SWAP]["found"]
    _, found = checks(capsys, config)
    assert storage.SWAP not in found
    code, found = checks(capsys, config, *on_disk, *ENDLESS)
    assert code == 78
    assert found[storage.SWAP]["state"] == "problem"
    assert "a folder on a larger disk" in found[storage.SWAP]["advice"]
    assert not (tmp_path / "not").exists()


def test_a_disk_without_room_for_two_checkpoints_is_a_problem(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = checks(capsys, config, *ENDLESS, "--run-dir", tmp_path / "run")
    assert code == 78
    assert "free on" in found["disk for checkpoints"]["found"]
    assert found["disk for checkpoints"]["state"] == "problem"


def test_a_job_is_refused_at_its_start_where_no_checkpoint_fits(config: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"free, one checkpoint takes [\d.]+ GiB"):
        storage.check_before_training(load_config(config, ENDLESS).config, tmp_path)
    storage.check_before_training(load_config(config, []).config, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_space_is_taken_and_given_back_to_learn_whether_one_may_have_it(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        assert storage._reserve(tmp_path, 2**19)
        with pytest.raises(OSError, match="No space left"):
            storage._reserve(tmp_path, 2**21)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_open_files_are_enough_for_few_ranks_and_not_for_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.look_at_limits()[0].state is State.OK
    monkeypatch.setenv("WORLD_SIZE", "1000000")
    assert host.look_at_limits()[0].state is State.PROBLEM


# --- what a killed compile leaves -------------------------------------------------------------------------------------


def lock_of(extensions: Path, operator: str, age_s: float) -> Path:
    path = extensions / "py311_cpu" / operator / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_killed_compiles_lock_is_found_with_its_path_its_age_and_what_to_do(extensions: Path) -> None:
    path = lock_of(extensions, "quantizer", 5 * 3600)
    (lock,) = compiled.compile_locks(waits_for_files=True)
    assert lock.is_left_behind
    assert lock.text == f"a compile of quantizer was killed 5 hours ago: {path} makes every later one wait for ever"
    assert lock.advice == f"if nothing is compiling there: rm {path}"


def test_a_lock_that_is_only_a_file_is_nothing_to_a_torch_that_locks_it(extensions: Path) -> None:
    lock_of(extensions, "quantizer", 5 * 3600)
    assert compiled.compile_locks(waits_for_files=False) == []


def test_a_compile_that_goes_on_is_told_from_a_killed_one(extensions: Path) -> None:
    with lock_of(extensions, "quantizer", 10).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (lock,) = compiled.compile_locks(waits_for_files=False)
        assert lock.is_held
        assert not lock.is_left_behind
    (fresh,) = compiled.compile_locks(waits_for_files=True)
    assert not fresh.is_left_behind


def test_what_a_configuration_compiles_is_known(config: Path, extensions: Path) -> None:
    assert compiled.operators_needed(load_config(config, []).config) == []
    zero = "engine.deepspeed_overrides.zero_optimization"
    quantized = load_config(config, [f"{zero}.zero_quantized_weights=true"]).config
    (found,) = compiled.look_at_operators(quantized)
    assert found.state is State.WARNING
    assert "quantizer will be compiled when the job starts" in found.found
    built = extensions / "py311_cpu" / "quantizer" / "quantizer.so"
    built.parent.mkdir(parents=True)
    built.touch()
    (found,) = compiled.look_at_operators(quantized)
    assert found.state is State.OK
