"""What is in a folder of shards: one ``manifest.json`` and, for each tar, where its samples lie (docs/data-format.md).

A shard is a plain WebDataset tar; the files of one sample follow each other and share the name up to the first dot.
``NAME.tar.index`` holds three little-endian uint64 for each sample: offset, length and CRC-32 of its bytes in the tar,
so that any sample is one read of 24 bytes and one of its own range.

A *location* is a local path, a URL or ``pipe:COMMAND``, as text. Manifest and indexes lie beside the tars or, for tars
that were made by others and can't be written to, in a folder of their own (``data.index_dir``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from glob import glob
from pathlib import Path
from typing import Any

from swinv2_scale.config.run import DataConfig, RemoteConfig, patterns_of
from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.remote.pipe import PIPE_PREFIX
from swinv2_scale.data.remote.stores import shown
from swinv2_scale.durable import write_whole
from swinv2_scale.errors import DataError

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".index"
INDEX_ENTRY = struct.Struct("<3Q")
INDEX_DIR: str = DataConfig.model_fields["index_dir"].default
_FORMAT = "swinv2_scale shards 2"
#: Without schema and digest.
_FIRST_FORMAT = "swinv2_scale shards 1"
#: Readers hold a sample in memory, and refuse larger ones.
MAX_SAMPLE_BYTES = 2**30
#: A JSON of a million shards is 200 MB; more is no manifest.
_MAX_MANIFEST_BYTES = 2**30
_REQUESTS_AT_ONCE = 32


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a manifest, a file of the manifest's own folder. ValueError where that can't be."""

    name: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        is_plain = not {"/", "\0"} & set(self.name) and self.name not in ("", ".", "..")
        if not is_plain or not all(isinstance(n, int) and 0 <= n < 2**63 for n in (self.samples, self.bytes)):
            raise ValueError(f"no entry of a shard: {self}")


@dataclass(frozen=True)
class Manifest:
    """A folder's ``manifest.json``.

    Attributes:
        entries: by file name.
        made_by: command, options, versions.
        schema: what samples hold: ``members`` (extension -> how many samples have it), ``classes`` (names in the order
            of labels), ``left_out`` (samples that were damaged when the index was made), more by data set.
    """

    entries: dict[str, ShardEntry]
    made_by: dict[str, Any]
    schema: dict[str, Any]

    def __post_init__(self) -> None:
        names = [self.schema.get(key, []) for key in ("classes", "class_names")]
        left_out = (item.keys() - {"samples"} for item in self.schema.get("left_out", []))
        is_ours = isinstance(self.made_by, dict) and all(isinstance(value, list) for value in names)
        if not is_ours or any(keys != {"shard", "key", "cause"} for keys in left_out):
            raise ValueError("its made_by or schema isn't as we write them")


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
        return tuple(shown(location) if is_remote(location) else location for location in self.locations)

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
                name = shown(location) if is_remote(location) else location
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


def index_location(shard: str) -> str:
    """Where the index of a shard lies that has one beside it; a URL's query stays at its end."""
    path, mark, query = shard.partition("?") if "://" in shard else (shard, "", "")
    return path + INDEX_SUFFIX + mark + query


def split_location(location: str) -> tuple[str, str]:
    """(folder, file name) of a shard. A command's folder is the command with the file's name cut out of it.

    Raises:
        DataError: a command that names no tar.
    """
    if location.startswith(PIPE_PREFIX):
        names = list(re.finditer(r"[^\s/'\"=]+\.tar\b", location))
        if not names:
            raise DataError(f"{location!r} names no .tar", "one command for each shard, its file named in it")
        last = names[-1]
        return location[: last.start()] + location[last.end() :], last.group()
    path = location.partition("?")[0] if "://" in location else location
    folder, slash, name = path.rpartition("/")
    return folder or slash or ".", name


def index_folder(index_dir: str, folder: str) -> Path:
    """Where the manifest and indexes of a folder lie that has none of its own."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-")[-60:]
    return Path(index_dir) / f"{slug}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


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


def read_manifest(folder: str, remote: RemoteFiles | None = None) -> Manifest:
    """The manifest of a folder, a URL or (always missing) a command.

    Raises:
        DataError: missing, damaged, or not a manifest.
    """
    where = f"{folder}/{MANIFEST_NAME}"
    missing = DataError(
        f"{folder} has no {MANIFEST_NAME}", "make one, for whoever's shards: swinv2-scale shards index (see --help)"
    )
    if folder.startswith(PIPE_PREFIX):
        raise missing
    try:
        if is_remote(folder):
            remote = remote or RemoteFiles(RemoteConfig())
            if remote.size(where) is None:
                raise missing
            text = remote.read_whole(where, _MAX_MANIFEST_BYTES).decode("utf-8")
        else:
            text = Path(local_path(where)).read_text(encoding="utf-8")
        data = json.loads(text)
        if data["format"] == _FIRST_FORMAT:
            data |= {"made_by": {"command": data["made_by"]}, "schema": {}}
        elif data["format"] != _FORMAT:
            raise DataError(f"{where} has format {data['format']!r}, this version reads {_FORMAT!r}")
        elif data.pop("digest") != _digest(data):
            raise DataError(f"{where} is damaged: its digest differs", "copy it again, or: swinv2-scale shards index")
        entries = {item["name"]: ShardEntry(**item) for item in data["shards"]}
        return Manifest(entries, data["made_by"], data["schema"])
    except FileNotFoundError:
        raise missing from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is not a manifest: {error!r}", "make a new one: swinv2-scale shards index") from error


def write_manifest(
    folder: Path, entries: Iterable[ShardEntry], made_by: str | dict[str, Any], schema: dict[str, Any] | None = None
) -> None:
    """Write ``folder/manifest.json``, whole or not at all; the folder's other names are on the disk after that too."""
    by = made_by if isinstance(made_by, dict) else {"command": made_by}
    data = {"format": _FORMAT, "made_by": by, "schema": schema or {}, "shards": [asdict(e) for e in entries]}
    data = json.loads(json.dumps(data))  # tuples as lists: what will be read is what is digested
    data["digest"] = _digest(data)
    write_whole(folder / MANIFEST_NAME, json.dumps(data, indent=1))


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sample_key(name: str) -> str:
    """A member's name up to the first dot of its last part, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def is_part_of_a_sample(name: str) -> bool:
    """Whether WebDataset sees a member: it has a base name and an extension, and isn't ``__meta__``."""
    base = name.rpartition("/")[2]
    first = name.partition("/")[0]
    return "." in base[1:] and base[0] != "." and not (len(first) > 3 and first[:2] == "__" == first[-2:])
