"""Checkpoints: save -> verify -> publish -> prune. A reader only ever sees complete ones.

``checkpoints/step-00000123/`` holds DeepSpeed's own files, ``state.json`` (ours) and ``manifest.json`` with the size
and SHA-256 of every file. It is written under another name and renamed once all ranks have finished; there is no
pointer file that could be torn.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from swinv2_scale import dist
from swinv2_scale.engine.deepspeed_import import LossScaler, TorchCheckpointEngine, ZeroStageEnum, fragment_address
from swinv2_scale.engine.step import TrainState
from swinv2_scale.errors import CheckpointError, ConfigError, OutputError
from swinv2_scale.telemetry.console import log

#: The only classes that a DeepSpeed checkpoint of ours may hold beside tensors and plain data: an enum and a number
#: holder, and three integers that stage 1 writes in bf16.
ALLOWED_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
_MANIFEST, _STATE, _PREFIX, _PART = "manifest.json", "state.json", "step-", ".part-"


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and what its manifest says."""

    path: Path
    step: int
    world_size: int
    files: tuple[FileRecord, ...]


class SafeCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's writer, which notes what it wrote and fails after the collective; its reader, which runs no code."""

    def __init__(self) -> None:
        self.name = "SafeCheckpointEngine"
        self.written: list[Path] = []
        self.failure: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        # Raising here would leave the other ranks waiting in save_checkpoint's barriers; publish() asks afterwards.
        watched: _WatchedFile | None = None
        try:
            watched = _WatchedFile(path, "wb")
            with io.BufferedWriter(watched) as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            cause = watched.failure if watched else None
            self.failure = cause or (error if isinstance(error, OSError) else OSError(f"{path}: {error}"))
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


class _WatchedFile(io.FileIO):
    """Remembers why a write failed: torch's zip writer reports a full disk as an unexpected position."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def publish(engine: Any, folder: Path, state: TrainState, facts: dict[str, Any], keep: int) -> Path:
    """Save a checkpoint with all ranks and publish it when every byte of every rank is on disk.

    Args:
        folder: RUN/checkpoints.
        facts: what else a resumed run has to know; JSON.
        keep: how many published checkpoints stay.

    Raises:
        OutputError: on every rank, if any rank couldn't write. Older checkpoints are untouched.
    """
    target = folder / f"{_PREFIX}{state.step:08d}"
    part = folder / f"{_PART}{target.name}"
    writer = SafeCheckpointEngine()

    def prepare() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    dist.on_rank_zero(prepare, f"starting the checkpoint {target}")
    with _engine_writes_with(engine, writer):
        engine.save_checkpoint(str(folder), tag=part.name, save_latest=False)
    records = _agreed(lambda: _describe(writer), part, target)
    all_records = [record for rank_records in dist.gather(records) for record in rank_records]

    def finish() -> None:
        state_file = part / _STATE
        _write_json(state_file, {**state.to_json(), **facts})
        manifest = {
            "step": state.step,
            "world_size": dist.world_size(),
            "files": [asdict(r) for r in sorted([*all_records, _record(state_file)], key=lambda r: r.name)],
        }
        _write_json(part / _MANIFEST, manifest)
        _sync_folder(part)
        shutil.rmtree(target, ignore_errors=True)  # an unverified one of the same step, from a life before a fall-back
        part.rename(target)
        _sync_folder(folder)
        _prune(folder, state.step, keep)

    _agreed(lambda: finish() if dist.rank() == 0 else None, part, target)
    return target


def find(folder: Path) -> list[Checkpoint]:
    """Published checkpoints, newest step first; the order is the manifest's, never a time stamp's."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            found.append(read(path))
        except CheckpointError as error:
            log().warning("%s; it is passed over", error.message)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def read(path: Path) -> Checkpoint:
    """What the manifest of one ``step-XXXXXXXX/`` says; verify() says whether it is true.

    Raises:
        CheckpointError: it isn't a published checkpoint.
    """
    try:
        data = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = tuple(FileRecord(**item) for item in data["files"])
        return Checkpoint(path, int(data["step"]), int(data["world_size"]), files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {error!r}", "use another checkpoint of the run"
        ) from error


def verify(checkpoint: Checkpoint) -> None:
    """Compare every byte with the manifest, in this process alone.

    Raises:
        CheckpointError: naming the damaged files.
    """
    damage = _damage(checkpoint.path, checkpoint.files)
    if damage:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is damaged: {'; '.join(damage[:3])}{' ..' if damage[3:] else ''}",
            "restore it from a copy, or use another checkpoint of the run",
        )


def open_run_or_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a path means, every byte of it verified, in this process alone.

    Args:
        path: a run directory or its ``checkpoints/``, for the newest whole one; or one ``step-XXXXXXXX/``.

    Raises:
        CheckpointError: it is damaged, or there is none.
    """
    advice = "name a run directory that has saved a checkpoint, or one of its checkpoints/step-XXXXXXXX"
    if not path.is_dir():
        raise CheckpointError(f"{path} {'is a file' if path.exists() else 'does not exist'}", advice)
    if path.name.startswith(_PREFIX) or (path / _MANIFEST).exists():
        checkpoint = read(path)
        verify(checkpoint)
        return checkpoint
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = find(folder)
    for checkpoint in candidates:
        try:
            verify(checkpoint)
        except CheckpointError as error:
            log().warning("%s; falling back to the one before", error.message)
        else:
            return checkpoint
    if candidates:
        raise _none_is_whole(folder, len(candidates))
    entries = sorted(entry.name for entry in folder.iterdir())
    content = ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if entries[8:] else "")
    raise CheckpointError(f"{folder} holds no whole checkpoint, it holds {content or 'nothing'}", advice)


def newest_verified(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; called by all ranks, each hashing a share.

    Raises:
        CheckpointError: there are checkpoints, but no whole one.
    """
    candidates = dist.on_rank_zero(lambda: find(folder), f"looking for checkpoints in {folder}")
    for checkpoint in candidates:
        mine = checkpoint.files[dist.rank() :: dist.world_size()]
        damage = [line for lines in dist.gather(_damage(checkpoint.path, mine)) for line in lines]
        if not damage:
            return checkpoint
        log().warning("checkpoint %s is damaged, falling back to the one before: %s", checkpoint.path, damage[0])
    if candidates:
        raise _none_is_whole(folder, len(candidates))
    return None


def read_state(checkpoint: Checkpoint) -> tuple[TrainState, dict[str, Any]]:
    """Our part of a checkpoint: the training's state, and the facts that publish() was given.

    Raises:
        CheckpointError: it was made by another version.
    """
    data = json.loads((checkpoint.path / _STATE).read_text(encoding="utf-8"))
    try:
        return TrainState.from_json(data), data
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} was made by another version: its state doesn't fit ({error!r})",
            "finish that run with the version that began it, or choose another --run-dir",
        ) from error


def load(engine: Any, checkpoint: Checkpoint) -> None:
    """Load weights, masters and optimizer states into a fresh engine.

    Raises:
        ConfigError: the checkpoint was written by another number of processes.
        CheckpointError: on every rank, if any rank couldn't load.
    """
    if checkpoint.world_size != dist.world_size():
        raise ConfigError(
            f"{checkpoint.path} was written by {checkpoint.world_size} processes, this job has {dist.world_size()}",
            f"start it with {checkpoint.world_size} processes; other numbers are not possible yet",
        )

    # DeepSpeed puts these back from the checkpoint too; they belong to the configuration, which may have changed.
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    clip_grad = getattr(engine.optimizer, "clip_grad", None)

    def load_own() -> None:
        try:
            with _engine_writes_with(engine, SafeCheckpointEngine()):
                path, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
            if path is None:
                raise RuntimeError("DeepSpeed found nothing to load")
        except (OSError, RuntimeError, AssertionError, KeyError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"rank {dist.rank()} cannot load {checkpoint.path}: {error!r}") from error

    dist.all_agree(load_own, f"loading {checkpoint.path}")
    for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    if clip_grad is not None:
        engine.optimizer.clip_grad = clip_grad


def remove_unpublished(folder: Path) -> None:
    """Delete what a killed save left behind; by rank 0, while it holds the run directory's lock."""
    for path in folder.glob(f"{_PART}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _engine_writes_with(engine: Any, writer: SafeCheckpointEngine) -> Iterator[None]:
    usual, engine.checkpoint_engine = engine.checkpoint_engine, writer
    # DeepSpeed copies two scripts into every checkpoint, outside its writer; a full disk would raise on rank 0 alone.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script


def _describe(writer: SafeCheckpointEngine) -> list[FileRecord]:
    if writer.failure is not None:
        raise writer.failure
    return [_record(path) for path in writer.written]


def _agreed(action: Any, part: Path, target: Path) -> Any:
    try:
        return dist.all_agree(action, f"writing the checkpoint {target}")
    except OutputError:
        if dist.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(path.name, path.stat().st_size, digest.hexdigest())


def _damage(folder: Path, records: tuple[FileRecord, ...]) -> list[str]:
    lines = []
    for record in records:
        path = folder / record.name
        try:
            found = _record(path)
        except OSError as error:
            lines.append(f"{path}: {error.strerror}")
            continue
        if found.bytes != record.bytes:
            lines.append(f"{path} has {found.bytes} bytes, its manifest says {record.bytes}")
        elif found.sha256 != record.sha256:
            lines.append(f"{path} has SHA-256 {found.sha256[:12]}.., its manifest says {record.sha256[:12]}..")
    return lines


def _none_is_whole(folder: Path, count: int) -> CheckpointError:
    return CheckpointError(
        f"none of the {count} checkpoints in {folder} is whole (the log names each damaged file)",
        "restore one from a copy, or start a new run with another --run-dir",
    )


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest ones up to the step just published; later ones were damaged and are of a dropped future."""
    found = find(folder)
    past = [checkpoint for checkpoint in found if checkpoint.step <= step]
    for checkpoint in [*past[keep:], *(checkpoint for checkpoint in found if checkpoint.step > step)]:
        # Renamed first: a deletion that is killed half-way is swept at the next start.
        gone = checkpoint.path.with_name(_PART + checkpoint.path.name)
        checkpoint.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write_json(path: Path, data: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
