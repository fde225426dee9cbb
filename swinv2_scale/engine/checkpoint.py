"""What a checkpoint is, which ones a run has, and whether every byte of them is as it was written.

``checkpoints/step-00000123/`` holds DeepSpeed's own files, each rank's random states, ``state.json`` (ours) and
``manifest.json`` with the size and SHA-256 of every file. It is written under another name and renamed once all ranks
have finished (engine/saving.py); there is no pointer file that could be torn.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swinv2_scale.durable import open_plain
from swinv2_scale.errors import CheckpointError
from swinv2_scale.telemetry.console import log

MANIFEST, STATE, PREFIX = "manifest.json", "state.json", "step-"
#: Folders of this name are being written or deleted; no reader looks at them.
PART = ".part-"


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and what its manifest says.

    Attributes:
        saved: when, for people; nothing is ordered by it.
        validation_loss: measured at this very step; None if it wasn't.
        score: what ``evaluation.metric`` says of it, smaller is better.
    """

    path: Path
    step: int
    world_size: int
    files: tuple[FileRecord, ...]
    saved: str = ""
    validation_loss: float | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        # Anybody can write a manifest that agrees with itself.
        counts = self.step, self.world_size - 1
        is_loss = all(value is None or isinstance(value, float) for value in (self.validation_loss, self.score))
        if not all(type(n) is int and 0 <= n < 2**31 for n in counts) or not isinstance(self.saved, str) or not is_loss:
            raise ValueError("its manifest holds other things than ours")

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files)


def name_of(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def manifest_text(
    step: int,
    world_size: int,
    files: Sequence[FileRecord],
    validation_loss: float | None = None,
    score: float | None = None,
) -> str:
    """The contents of ``manifest.json``, a digest of themselves among them."""
    data = {
        "step": step,
        "world_size": world_size,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "validation_loss": _finite(validation_loss),
        "score": _finite(score),
        "files": [asdict(record) for record in sorted(files, key=lambda record: record.name)],
    }
    return json.dumps({**data, "sha256": _digest(data)}, indent=1)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def find(folder: Path) -> list[Checkpoint]:
    """Published checkpoints, newest step first; the order is the manifest's, never a time stamp's."""
    found = []
    for path in folder.glob(f"{PREFIX}*"):
        try:
            found.append(read(path))
        except CheckpointError as error:
            log().warning("%s; it is passed over", error.message)
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def read(path: Path) -> Checkpoint:
    """What the manifest of one ``step-XXXXXXXX/`` says; verify() says whether it is true of the files.

    Raises:
        CheckpointError: it isn't a published checkpoint, or the manifest itself is damaged.
    """
    try:
        with open_plain(path / MANIFEST) as file:
            data = json.load(file)
        if data.pop("sha256") != _digest(data):
            raise ValueError("its manifest doesn't agree with its own digest")
        files = tuple(FileRecord(**item) for item in data.pop("files"))
        for record in files:
            if not _is_plain_name(record.name) or type(record.bytes) is not int:
                raise ValueError(f"a file of it would be {record.name!r} of {record.bytes!r} bytes")
        return Checkpoint(path, files=files, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {found}", "use another checkpoint of the run"
        ) from error


def verify(checkpoint: Checkpoint, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Compare every byte with the manifest, in this process alone.

    Args:
        progress: called with the size of each file that was read.

    Raises:
        CheckpointError: naming the damaged files.
    """
    damage = _damage(checkpoint.path, checkpoint.files, progress)
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
    if path.name.startswith(PREFIX) or (path / MANIFEST).exists():
        checkpoint = read(path)
        verify(checkpoint)
        return checkpoint
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = _newest_whole(folder, _candidates(folder), lambda checkpoint: _damage(checkpoint.path, checkpoint.files))
    if found:
        return found
    entries = sorted(entry.name for entry in folder.iterdir())
    content = ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if entries[8:] else "")
    raise CheckpointError(f"{folder} holds no whole checkpoint, it holds {content or 'nothing'}", advice)


def newest_verified(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; called by all ranks, each hashing a share.

    Raises:
        CheckpointError: there are checkpoints, but no whole one.
    """
    from swinv2_scale import dist  # commands that look at a run have no torch

    candidates = dist.on_rank_zero(lambda: _candidates(folder), f"looking for checkpoints in {folder}")

    def damage(checkpoint: Checkpoint) -> list[str]:
        mine = checkpoint.files[dist.rank() :: dist.world_size()]
        return [line for lines in dist.gather(_damage(checkpoint.path, mine)) for line in lines]

    return _newest_whole(folder, candidates, damage)


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """``state.json``: the training's state, and the facts about the run that it was saved with.

    Raises:
        CheckpointError: it can't be read; verify() would have found that.
    """
    path = checkpoint.path / STATE
    try:
        if STATE not in {record.name for record in checkpoint.files}:
            raise ValueError("its manifest doesn't vouch for it")
        with open_plain(path) as file:
            data: dict[str, Any] = json.load(file)
        if not isinstance(data["config"], dict):
            raise TypeError("its config is no mapping")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "swinv2-scale checkpoint verify RUN") from error
    return data


def _is_plain_name(name: str) -> bool:
    """Of a file in the checkpoint's own folder; never a path out of it."""
    return name not in ("", ".", "..", MANIFEST) and not {"/", "\0"} & set(name)


def _damage(
    folder: Path, records: Sequence[FileRecord], progress: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    lines = []
    for record in records:
        path = folder / record.name
        try:
            if path.is_symlink():
                raise OSError(None, "it is a symbolic link")
            with open_plain(path) as file:
                found, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        except OSError as error:
            lines.append(f"{path}: {error.strerror}")
            continue
        if num_bytes != record.bytes:
            lines.append(f"{path} has {num_bytes} bytes, its manifest says {record.bytes}")
        elif found != record.sha256:
            lines.append(f"{path} has SHA-256 {found[:12]}.., its manifest says {record.sha256[:12]}..")
        progress(record.bytes)
    return lines


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _candidates(folder: Path) -> tuple[list[Checkpoint], int]:
    """What could be loaded, and how many folders look as if they could."""
    return find(folder), len(list(folder.glob(f"{PREFIX}*")))


def _newest_whole(
    folder: Path, candidates: tuple[list[Checkpoint], int], damage: Callable[[Checkpoint], list[str]]
) -> Checkpoint | None:
    found, num_folders = candidates
    for checkpoint in found:
        lines = damage(checkpoint)
        if not lines:
            return checkpoint
        log().warning("checkpoint %s is damaged, falling back to the one before: %s", checkpoint.path, lines[0])
    if num_folders:
        # Never from the beginning without a word, where there is a run.
        raise CheckpointError(
            f"none of the {num_folders} checkpoints in {folder} is whole (the log names what is damaged)",
            "restore one from a copy, or start a new run with another --run-dir",
        )
    return None
