"""The manifest and indexes of shards that others made, wherever they lie: ``swinv2-scale shards index``."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.shards.indexing import LeftOut, ShardScan, scan_shard
from swinv2_scale.data.shards.labels import total
from swinv2_scale.data.shards.manifest import (
    INDEX_DIR,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    index_folder,
    read_manifest,
    split_location,
    write_manifest,
)
from swinv2_scale.data.shards.stream import open_shard
from swinv2_scale.data.workers import in_order
from swinv2_scale.errors import DataError, OutputError

#: Of a manifest's schema: what is counted anew with every index.
_COUNTED = {"members", "labels", "left_out"}
_PART_SUFFIX = INDEX_SUFFIX + ".part"


@dataclass(frozen=True)
class IndexedFolder:
    """What was written for the shards of one folder.

    Attributes:
        folder: where the shards lie.
        destination: where manifest and indexes lie now.
        scanned: entries of the shards that were read now.
        changed: of these, how many an older manifest had with other bytes.
        kept: how many other shards the older manifest had, and the new one has still.
    """

    folder: str
    destination: Path
    scanned: tuple[ShardEntry, ...]
    left_out: tuple[LeftOut, ...]
    is_cut: bool
    passed_over: int
    changed: int
    kept: int


def index_folders(
    locations: Sequence[str],
    remote: RemoteFiles,
    *,
    index_dir: str | None = None,
    skip_damaged: bool = False,
    processes: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[IndexedFolder]:
    """Read each shard once; write indexes and one manifest for each folder they lie in.

    Beside the shards where that is possible and no ``index_dir`` is given. A manifest that is there already keeps its
    other shards, and what it says about classes if a shard of it hasn't changed. All shards are read before the first
    file of ours is replaced.

    Args:
        on_progress: called with how many shards have been read.

    Raises:
        DataError: a shard is damaged or has a sample too large for readers, and ``skip_damaged`` is False; two have one
            name; one can't be read.
        OutputError: no place to write to.
    """
    places = [split_location(location) for location in locations]
    if len(set(places)) < len(places):
        twice = next(place for place, count in Counter(places).items() if count > 1)
        raise DataError(f"{twice[1]} of {twice[0]} was named twice", "name each shard once")
    destinations = {folder: _destination(folder, index_dir) for folder, _ in places}
    jobs = [(location, name, destinations[folder]) for location, (folder, name) in zip(locations, places, strict=True)]
    scans: list[ShardScan] = []
    try:
        for scan in in_order(partial(_scan, remote=remote, skip_damaged=skip_damaged), jobs, min(processes, len(jobs))):
            scans.append(scan)
            on_progress(len(scans))
        return [
            _publish(folder, destination, [s for s, place in zip(scans, places, strict=True) if place[0] == folder])
            for folder, destination in destinations.items()
        ]
    except OSError as error:
        raise OutputError(f"the indexes cannot be written: {error}", "choose another place: --index-dir") from error
    finally:
        for _, name, destination in jobs:
            with contextlib.suppress(OSError):  # a place that can't be written to, which has been said
                (destination / (name + _PART_SUFFIX)).unlink()


def _destination(folder: str, index_dir: str | None) -> Path:
    apart = index_folder(index_dir or INDEX_DIR, folder)
    if index_dir is None and not is_remote(folder):
        # A manifest that lies apart counts before one beside the shards, so it is the one to replace.
        beside = Path(local_path(folder))
        if os.access(beside, os.W_OK) and not (apart / MANIFEST_NAME).exists():
            return beside
    try:
        apart.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {apart}: {error}", "choose another place: --index-dir") from error
    return apart


def _scan(job: tuple[str, str, Path], *, remote: RemoteFiles, skip_damaged: bool) -> ShardScan:
    """In a worker: read a shard and write its index under a temporary name."""
    location, name, destination = job
    try:
        with open_shard(location, remote) as stream:
            scan = scan_shard(stream, location, name, skip_damaged=skip_damaged)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error
    part = destination / (name + _PART_SUFFIX)
    part.unlink(missing_ok=True)
    with part.open("xb") as file:  # never through a link: the folder is somebody else's
        file.write(scan.index)
    return scan


def _publish(folder: str, destination: Path, scans: list[ShardScan]) -> IndexedFolder:
    old = _old_manifest(destination)
    scanned = {scan.entry.name: scan.entry for scan in scans}
    others = {name: entry for name, entry in old.entries.items() if name not in scanned}
    if not is_remote(folder):
        others = {name: entry for name, entry in others.items() if (Path(local_path(folder)) / name).exists()}
    known = [entry for name, entry in scanned.items() if name in old.entries]
    changed = sum(entry.sha256 != old.entries[entry.name].sha256 for entry in known)
    schema: dict[str, Any] = {}
    if others or len(known) > changed:  # the same data set as before
        schema = {key: value for key, value in old.schema.items() if key not in _COUNTED}
    if not others:
        members: Counter[str] = Counter()
        for scan in scans:
            members.update(scan.members)
        schema["members"] = dict(sorted(members.items()))
        schema |= total(scan.labels for scan in scans).as_schema()
    left_out = [left for scan in scans for left in scan.left_out]
    earlier = [item for item in old.schema.get("left_out", []) if item["shard"] in others]
    if left_out or earlier:
        schema["left_out"] = earlier + [asdict(left) for left in left_out]
    for name in scanned:
        (destination / (name + _PART_SUFFIX)).replace(destination / (name + INDEX_SUFFIX))
    made_by: dict[str, Any] = {"command": "swinv2-scale shards index"}
    if old.made_by and old.made_by.get("command") != made_by["command"] and schema.keys() - _COUNTED:
        made_by |= {"of": old.made_by}
    entries = sorted([*others.values(), *scanned.values()], key=lambda entry: entry.name)
    write_manifest(destination, entries, made_by, schema)
    return IndexedFolder(
        folder,
        destination,
        tuple(scanned.values()),
        tuple(left_out),
        any(scan.is_cut for scan in scans),
        sum(scan.passed_over for scan in scans),
        changed,
        len(others),
    )


def _old_manifest(destination: Path) -> Manifest:
    try:
        return read_manifest(str(destination))
    except DataError:  # none, or a damaged one, which is a reason to make a new one
        return Manifest({}, {}, {})


def tars_of(words: str) -> str:
    """The pattern that is meant by a pattern or a local folder."""
    return (
        str(Path(local_path(words)) / "*.tar") if not is_remote(words) and Path(local_path(words)).is_dir() else words
    )
