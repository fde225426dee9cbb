"""What counts as a checkpoint: complete, whole, newest by its manifest. No engine is needed to judge that."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swinv2_scale import dist
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.checkpoint import FileRecord, manifest_text
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.errors import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.start(30)
    yield
    dist.stop()


def make(folder: Path, step: int) -> Path:
    """A checkpoint as publish() leaves it, with other content than DeepSpeed's."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    records = []
    for name in ("a.pt", "b.pt"):
        data = f"{step} {name}".encode() * 100
        (path / name).write_bytes(data)
        records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
    (path / "manifest.json").write_text(manifest_text(step, 1, records))
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        make(tmp_path, step)
    found = checkpoint.newest_verified(tmp_path)
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "a.pt"),
        lambda path: os.truncate(path / "b.pt", 3),
        lambda path: (path / "b.pt").unlink(),
        lambda path: shutil.copy(path.parent / "step-00000002" / "a.pt", path / "a.pt"),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text('{"step": 4, "fil'),
        lambda path: (path / "manifest.json").write_text('{"step": 4}'),
    ],
    ids=["flipped", "cut", "deleted", "of another step", "no manifest", "torn manifest", "half a manifest"],
)
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    make(tmp_path, 2)
    damage(make(tmp_path, 4))
    found = checkpoint.newest_verified(tmp_path)
    assert found is not None
    assert found.step == 2


def test_every_single_flipped_byte_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 4) / "a.pt"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 128]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
            checkpoint.newest_verified(tmp_path)


def test_what_a_killed_save_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    outside = make(tmp_path / "outside", 4)
    make(run.checkpoints / ".part-an-older-life", 4)
    make(run.checkpoints, 4).rename(run.checkpoints / ".part-step-00000004")  # a deletion that was killed
    (run.checkpoints / ".part-link").symlink_to(outside)
    assert checkpoint.newest_verified(run.checkpoints) is None
    run.open()
    assert list(run.checkpoints.iterdir()) == [run.staging]
    assert (outside / "a.pt").exists()
    run.close()
    assert list(run.checkpoints.iterdir()) == []


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest_verified(tmp_path) is None
    assert checkpoint.newest_verified(tmp_path / "missing") is None
