"""Run directories and checkpoints from somebody else (F13): what is left to the checkpoint code.

To be put into tests/faults/ when engine/checkpoint.py and engine/run_dir.py refuse these (fix.patch does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale import dist
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.checkpoint import FileRecord, _digest, manifest_text
from swinv2_scale.engine.resume import read_state
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.errors import CheckpointError, OutputError
from tests.support.deadline import within

DEADLINE_S = 30
DEEP = "[" * 200_000


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.start(30)
    yield
    dist.stop()


def make(folder: Path, state: bytes = b"{}", **changes: Any) -> Path:
    """A checkpoint of one file whose manifest agrees with itself and with it."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(state)
    record = FileRecord("state.json", len(state), hashlib.sha256(state).hexdigest())
    data = json.loads(manifest_text(2, 1, [record])) | changes
    del data["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**data, "sha256": _digest(data)}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": -1},
        {"step": 2.5},
        {"world_size": 10**12},
        {"world_size": 0},
        {"saved": ["x"]},
        {"validation_loss": "0.1"},
        {"files": [{"name": "..", "bytes": 1, "sha256": "x"}]},
        {"files": [{"name": "a\0b", "bytes": 1, "sha256": "x"}]},
        {"files": [{"name": "state.json", "bytes": "2", "sha256": "x"}]},
    ],
    ids=str,
)
def test_f13_a_manifest_that_agrees_with_itself_alone_is_no_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    with within(DEADLINE_S), pytest.raises(CheckpointError):
        checkpoint.read(make(tmp_path / "step-00000002", **changes))


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_f13_json_without_end_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "step-00000002", DEEP.encode())
    if name == "manifest.json":
        (path / name).write_text(DEEP)
    with within(DEADLINE_S), pytest.raises(CheckpointError):
        read_state(checkpoint.open_run_or_checkpoint(path))


@pytest.mark.parametrize(
    "state", ["[]", "{", '"x"', '{"step": 1}', '{"step": "1", "samples_seen": [], "skipped_in_a_row": {}, "ledger": 5}']
)
def test_f13_a_state_of_other_types_is_of_another_version(tmp_path: Path, state: str) -> None:
    found = checkpoint.open_run_or_checkpoint(make(tmp_path / "step-00000002", state.encode()))
    with pytest.raises(CheckpointError):
        read_state(found)


def test_f13_a_state_that_the_manifest_does_not_vouch_for_is_not_read(tmp_path: Path) -> None:
    """Only what was verified is."""
    with pytest.raises(CheckpointError):
        read_state(checkpoint.open_run_or_checkpoint(make(tmp_path / "step-00000002", files=[])))


def test_f13_a_state_without_the_runs_configuration_is_of_another_version(tmp_path: Path) -> None:
    """find_checkpoint takes facts["config"] and ["train_digest"]."""
    data = {"step": 1, "samples_seen": 1, "skipped_in_a_row": 0, "ledger": {"accounts": []}, "config": ["x"]}
    found = checkpoint.open_run_or_checkpoint(make(tmp_path / "step-00000002", json.dumps(data).encode()))
    with pytest.raises(CheckpointError):
        read_state(found)


def test_f13_a_manifest_that_is_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    import os

    path = make(tmp_path / "step-00000002")
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    with within(DEADLINE_S), pytest.raises(CheckpointError):
        checkpoint.read(path)


@pytest.mark.parametrize("name", [".lock", "lives.jsonl", "metrics.jsonl", "quarantine.jsonl", "log/rank-0.log"])
def test_f13_a_run_directory_does_not_write_through_links(tmp_path: Path, name: str) -> None:
    """An archive with a run in it may hold them: rank 0 would empty, or add to, a file of ours."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(OutputError, match="link"):
        directory.open()
    directory.close()
    assert outside.read_text() == "precious"


def test_f13_a_run_directory_does_not_draw_its_pictures_through_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "run" / "panels").mkdir(parents=True)
    (tmp_path / "run" / "panels" / "step-00000010.png").symlink_to(outside)
    with pytest.raises(OutputError, match="link"):
        RunDirectory(tmp_path / "run").open()
    assert outside.read_text() == "precious"


def test_f13_folders_of_a_run_may_lie_elsewhere(tmp_path: Path) -> None:
    """Checkpoints on a large disk, by a link to a folder, are usual."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    directory.close()


def test_f13_what_killed_saves_left_is_deleted_not_what_links_of_that_name_lead_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    make(outside / "x")
    checkpoints = tmp_path / "run" / "checkpoints"
    make(checkpoints / ".part-1" / "step-00000002")
    (checkpoints / ".part-1" / "link").symlink_to(outside)
    (checkpoints / ".part-2").symlink_to(outside)
    (checkpoints / ".part-3").symlink_to(outside / "x" / "state.json")
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    directory.close()
    assert list(checkpoints.iterdir()) == []
    assert sorted(path.name for path in (outside / "x").iterdir()) == ["manifest.json", "state.json"]
