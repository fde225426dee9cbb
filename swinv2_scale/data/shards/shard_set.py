"""The shards that a pattern means, wherever they lie, with what their manifests say about them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from glob import glob
from pathlib import Path

from swinv2_scale.config.run import RemoteConfig, patterns_of
from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.remote.pipe import PIPE_PREFIX
from swinv2_scale.data.remote.stores import without_secrets
from swinv2_scale.data.shards.manifest import (
    INDEX_DIR,
    INDEX_ENTRY,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    index_folder,
    index_location,
    read_manifest,
    split_location,
)
from swinv2_scale.errors import DataError

_REQUESTS_AT_ONCE = 32


@dataclass(frozen=True)
class FileProblem:
    """A shard that isn't there as its manifest says."""

    shard: int
    message: str
    is_missing: bool


@dataclass(frozen=True)
class ShardSet:
    """Shards in the order of their names, which is what positions count over.

    Args:
        locations: of the tars.
        entries: what the manifests say about them.
        index_locations: of their indexes.
        sources: how many shards each data set of a mixture has, one after the other; by default they are one.
    """

    locations: tuple[str, ...]
    entries: tuple[ShardEntry, ...]
    index_locations: tuple[str, ...]
    sources: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", self.sources or (len(self.locations),))
        assert sum(self.sources) == len(self.locations) == len(self.entries) == len(self.index_locations)

    @classmethod
    def joined(cls, parts: Iterable[ShardSet]) -> ShardSet:
        """Several data sets, each a source of its own."""
        parts = tuple(parts)
        return cls(
            tuple(location for part in parts for location in part.locations),
            tuple(entry for part in parts for entry in part.entries),
            tuple(location for part in parts for location in part.index_locations),
            tuple(len(part.locations) for part in parts),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(entry.samples for entry in self.entries)

    @cached_property
    def shard_ids(self) -> tuple[str, ...]:
        """A name for the content of each shard, whatever it is called; a copy listed again gets a number."""
        seen: Counter[str] = Counter()
        ids = []
        for entry in self.entries:
            copies = seen[entry.sha256]
            seen[entry.sha256] += 1
            ids.append(entry.sha256[:16] + (f"#{copies}" if copies else ""))
        return tuple(ids)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The locations for people: URLs without what may be keys."""
        return tuple(map(without_secrets, self.locations))

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @cached_property
    def digest(self) -> str:
        """Changes with any byte of any shard, not with where the shards lie."""
        text = "\n".join(f"{e.name} {e.samples} {e.sha256}" for e in self.entries)
        if len(self.sources) > 1:
            text += f"\nsources {self.sources}"
        return hashlib.sha256(text.encode()).hexdigest()

    def file_problems(self, remote: RemoteFiles | None = None) -> list[FileProblem]:
        """Shards and indexes that are missing or haven't the size that the manifest says.

        Raises:
            DataError: a store doesn't answer.
        """
        remote = remote or RemoteFiles(RemoteConfig())

        def look(shard: int) -> list[FileProblem]:
            entry = self.entries[shard]
            wanted = {self.locations[shard]: entry.bytes}
            wanted[self.index_locations[shard]] = entry.samples * INDEX_ENTRY.size
            problems = []
            for location, size in wanted.items():
                name = without_secrets(location)
                if location.startswith(PIPE_PREFIX):
                    continue  # a command tells nothing before it has been run
                try:
                    found = remote.size(location) if is_remote(location) else os.stat(local_path(location)).st_size
                except FileNotFoundError:
                    found = None
                except OSError as error:
                    problems.append(FileProblem(shard, f"{name}: {error}", True))
                    continue
                if found is None:
                    problems.append(FileProblem(shard, f"{name} is missing", True))
                elif found != size:
                    message = f"{name} has {found} bytes, its manifest says {size}"
                    problems.append(FileProblem(shard, message, False))
            return problems

        shards = range(len(self.locations))
        if not any(map(is_remote, (*self.locations, *self.index_locations))):
            return [problem for shard in shards for problem in look(shard)]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            return [problem for problems in pool.map(look, shards) for problem in problems]


def raise_file_problems(problems: list[FileProblem]) -> None:
    """
    Raises:
        DataError: naming the missing or truncated files, if there are any.
    """
    if problems:
        shown = "".join(f"\n  - {problem.message}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(
            f"{len(problems)} shard files are missing or damaged:{shown}{more}",
            "copy them again; for shards changed on purpose, make a new manifest: swinv2-scale shards index",
        )


def expand_pattern(pattern: str | Iterable[str], remote: RemoteFiles | None = None) -> list[str]:
    """Locations of a brace pattern (``{000..127}``), a glob, several joined with ``::``, or a list of those.

    Raises:
        DataError: a part matches nothing.
    """
    from webdataset.shardlists import expand_urls

    remote = remote or RemoteFiles(RemoteConfig())
    locations: list[str] = []
    for part in patterns_of(pattern):
        found = [place for name in expand_urls(part) for place in _matches(name, remote)]
        is_local = bool(found) and not any(map(is_remote, found))
        if not found or (is_local and not any(os.path.exists(place) for place in found)):
            where = "" if is_remote(part) else f" (looked in {Path(local_path(part)).parent.resolve()})"
            raise DataError(
                f"no shards match {part!r}{where}",
                "correct data.train / data.validation; brace patterns ({000..127}) and globs (*.tar) both work",
            )
        locations += found
    return locations


def _matches(name: str, remote: RemoteFiles) -> list[str]:
    if name.startswith(PIPE_PREFIX):
        return [name]
    if not is_remote(name):
        name = local_path(name)
        return sorted(glob(name)) if _is_glob(name) else [name]
    folder, file = split_location(name)
    if "*" not in file and "[" not in file:
        return [name]
    names = remote.list_names(folder)
    if names is None:
        raise DataError(f"{name!r}: this store can't list its files", "write the names as {000000..000127}.tar")
    return [f"{folder}/{found}" for found in sorted(names) if fnmatch(found, file)]


def read_shard_set(
    pattern: str | Iterable[str], remote: RemoteFiles | None = None, index_dir: str = INDEX_DIR
) -> ShardSet:
    """Find the shards of a pattern and what their manifests say about them.

    Args:
        index_dir: a manifest that lies there counts before the one beside the shards.

    Raises:
        DataError: no shards, no manifest, or a shard that its manifest doesn't know.
    """
    remote = remote or RemoteFiles(RemoteConfig())

    @cache
    def find_manifest(folder: str) -> tuple[Manifest, str | None]:
        apart = index_folder(index_dir, folder)
        is_apart = (apart / MANIFEST_NAME).exists()
        return read_manifest(str(apart) if is_apart else folder, remote), str(apart) if is_apart else None

    locations: list[str] = []
    for part in patterns_of(pattern):
        found = expand_pattern(part, remote)
        locations += _with_missing(part, found, lambda folder: find_manifest(folder)[0]) if _is_glob(part) else found
    entries, index_locations = [], []
    for location in locations:
        folder, name = split_location(location)
        manifest, apart_folder = find_manifest(folder)
        entry = manifest.entries.get(name)
        if entry is None:
            raise DataError(
                f"the manifest of {apart_folder or folder} doesn't list {name}",
                f"make a new one: swinv2-scale shards index '{location}'",
            )
        entries.append(entry)
        index_locations.append(f"{apart_folder}/{name}{INDEX_SUFFIX}" if apart_folder else index_location(location))
    return ShardSet(tuple(locations), tuple(entries), tuple(index_locations))


def _with_missing(part: str, found: list[str], manifest_of: Callable[[str], Manifest]) -> list[str]:
    """A glob finds the shards that are there; the manifests of their folders know which ones should be."""
    from webdataset.shardlists import expand_urls

    patterns = [split_location(local_path(name))[1] for name in expand_urls(part)]
    wanted = set(found)
    for folder in {split_location(location)[0] for location in found}:
        names = [name for name in manifest_of(folder).entries if any(fnmatch(name, file) for file in patterns)]
        wanted.update(name if folder == "." else f"{folder.rstrip('/')}/{name}" for name in names)
    return sorted(wanted)


def _is_glob(pattern: str) -> bool:
    return not pattern.startswith(PIPE_PREFIX) and any(c in pattern for c in "*?[")
