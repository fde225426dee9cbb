"""F23: a job builds no operator, so that no killed build can leave a lock that hangs the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import pretrain
from tests.support.small_run import write_config


def test_f23_a_job_trains_without_a_compiler_and_locks_and_builds_nothing(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 in bf16 with checkpointing and files, by two processes: all that DeepSpeed could want an operator for."""
    for name in ("extensions", "programs", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    config = write_config(tmp_path, shards)
    files = [f"engine.offload.{what}=nvme" for what in ("optimizer_states", "parameters")]
    files += [f"engine.offload.nvme_dir={tmp_path}/swap"]
    finished = pretrain("--config", config, "--run-dir", tmp_path / "run", "--steps", 1, *files, processes=2)
    assert finished.code == 0, finished.output
    assert list((tmp_path / "extensions").rglob("*")) == []
    assert not list((tmp_path / "home").rglob("*torch_extensions*"))
