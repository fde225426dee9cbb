"""Shards back to a folder of files: ``swinv2-scale shards export``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from swinv2_scale.data.images.decode import decode_class
from swinv2_scale.data.inspection.stats import class_names
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.indexing import shown
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import new_folder
from swinv2_scale.errors import DataError, SampleError

_MAX_NAME_BYTES = 255  # of one part of a path, on all file systems in use
_PROGRESS_EVERY = 100


def export_folder(
    pattern: str,
    remote: RemoteFiles,
    index_dir: str,
    destination: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write each file of each sample as ``CLASS/KEY.EXT``, or ``KEY.EXT`` where there are no labels.

    A key that begins with its class's folder isn't put into another. Names come from outside: one that a path can't
    be made of, or that would lead out of the folder, is refused, nothing is renamed in silence. The folder appears
    under its name when all of it has been written.

    Returns:
        How many samples were written.

    Raises:
        DataError: no shards, no manifest, a damaged sample, a name that is refused, or two files of one name.
        OutputError: the folder exists already, or can't be written.
    """
    shards = read_shard_set(pattern, remote, index_dir)
    classes = class_names(shards, remote, for_people=False)
    reader = ShardReader(shards, remote)
    done = 0
    try:
        with new_folder(destination) as part:
            for shard, size in enumerate(shards.sizes):
                for number in range(size):
                    _write_sample(reader.read(shard, number), classes, part)
                    done += 1
                    if done % _PROGRESS_EVERY == 0:
                        on_progress(done, shards.num_samples)
    finally:
        reader.close()
    return done


def _write_sample(record: Record, classes: Mapping[int, str], folder: Path) -> None:
    key = record.key
    try:
        label = decode_class(record, None)
        class_folder = classes.get(label, str(label)).replace("/", "_")
        if key.partition("/")[0] != class_folder:
            key = f"{class_folder}/{key}"
    except SampleError:
        pass  # without a label
    for extension, data in record.files.items():
        path = folder / _safe(f"{key}.{extension}", record)
        try:
            # The folder is new and ours, and holds no links: what has safe parts stays inside.
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(
                f"{shown(record.name)}: another sample has a file {shown(key)}.{shown(extension)} too"
            ) from error


def _safe(name: str, record: Record) -> str:
    """The name, if each of its parts is an ordinary one.

    Raises:
        DataError: it isn't.
    """
    try:
        parts = [os.fsencode(part) for part in name.split("/")]
    except UnicodeEncodeError:  # no text of any file system
        parts = [b""]
    if any(part in (b"", b".", b"..") or b"\0" in part or len(part) > _MAX_NAME_BYTES for part in parts):
        raise DataError(
            f"sample {shown(record.name)} has a name that no file may have: {shown(name)!r}",
            "rename it where the shards are made; training doesn't mind such names",
        )
    return name
