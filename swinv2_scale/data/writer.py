"""Write samples into WebDataset tars with a manifest: the whole folder, or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import webdataset

from swinv2_scale.data.manifest import ShardEntry, index_shard, write_manifest
from swinv2_scale.errors import OutputError

#: A sample: ``__key__`` and one value a file extension, bytes already.
RawSample = dict[str, str | bytes]


def write_shards(samples: Iterable[RawSample], folder: Path, *, samples_per_shard: int, made_by: str) -> int:
    """Write ``000000.tar``, ``000001.tar``, ... , their indexes and the manifest.

    Same samples, same bytes: members carry no time, owner or host. The folder appears under its name when all of it
    is on disk.

    Returns:
        How many samples were written.

    Raises:
        OutputError: the folder exists already, or can't be written.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already; nothing was overwritten", "choose another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", "choose another folder (data.shards_dir)") from error
    try:
        entries = _write_tars(samples, part, samples_per_shard)
        write_manifest(part, entries, made_by)
        part.chmod(0o755)
        os.rename(part, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", "free some space or choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sum(entry.samples for entry in entries)


def _write_tars(samples: Iterable[RawSample], folder: Path, samples_per_shard: int) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    stream = iter(samples)
    while chunk := list(islice(stream, samples_per_shard)):
        path = folder / f"{len(entries):06d}.tar"
        with path.open("wb") as file:
            with webdataset.TarWriter(file, user="", group="", mtime=0) as tar:
                for sample in chunk:
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        entries.append(index_shard(path))
    return entries
