"""What is in a folder of shards: one ``manifest.json`` and, beside each tar, where its samples lie.

A shard is a plain WebDataset tar; the files of one sample follow each other and share the name up to the first dot.
``NAME.tar.index`` holds three little-endian uint64 for each sample: offset, length and CRC-32 of its bytes in the tar,
so that any sample is one read of 24 bytes and one of its own range.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from glob import glob
from pathlib import Path

from swinv2_scale.errors import DataError

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".index"
INDEX_ENTRY = struct.Struct("<3Q")
_FORMAT = "swinv2_scale shards 1"


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSet:
    """The shards of one data set in the order of their names, which is what positions count over."""

    paths: tuple[Path, ...]
    entries: tuple[ShardEntry, ...]

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
        return hashlib.sha256(text.encode()).hexdigest()

    def check_files(self) -> None:
        """Every shard and its index are there, with the size that the manifest says.

        Raises:
            DataError: naming each missing or truncated file.
        """
        wrong = []
        for path, entry in zip(self.paths, self.entries, strict=True):
            wanted = {path: entry.bytes, index_path(path): entry.samples * INDEX_ENTRY.size}
            for file, size in wanted.items():
                try:
                    found = file.stat().st_size
                except OSError as error:
                    wrong.append(f"{file} is missing" if isinstance(error, FileNotFoundError) else f"{file}: {error}")
                    continue
                if found != size:
                    wrong.append(f"{file} has {found} bytes, its manifest says {size}")
        if wrong:
            shown = "".join(f"\n  - {line}" for line in wrong[:20])
            more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            raise DataError(
                f"{len(wrong)} shard files are missing or damaged:{shown}{more}",
                "copy them again; for shards changed on purpose, make a new manifest: swinv2-scale shards index",
            )


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


def expand_pattern(pattern: str | Iterable[str]) -> list[Path]:
    """Paths of a brace pattern (``{000..127}``), a glob, several joined with ``::``, or a list of those.

    Raises:
        DataError: a part is a URL or matches nothing.
    """
    from webdataset.shardlists import expand_urls

    parts = [part for item in ([pattern] if isinstance(pattern, str) else pattern) for part in item.split("::")]
    paths: list[Path] = []
    for part in parts:
        if part.startswith("pipe:") or "://" in part:
            raise DataError(f"{part!r}: only local files are read so far", "copy the shards, or mount the store")
        named = expand_urls(part)
        found = [p for name in named for p in (sorted(glob(name)) if any(c in name for c in "*?[") else [name])]
        if not found or not any(Path(p).exists() for p in found):
            raise DataError(
                f"no shards match {part!r} (looked in {Path(part).parent.resolve()})",
                "correct data.train / data.validation; brace patterns ({000..127}) and globs (*.tar) both work",
            )
        paths += map(Path, found)
    return paths


def read_shard_set(pattern: str | Iterable[str]) -> ShardSet:
    """Find the shards of a pattern and what their manifests say about them.

    Raises:
        DataError: no shards, no manifest, or a shard that its manifest doesn't know.
    """
    paths = expand_pattern(pattern)
    manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    entries = []
    for path in paths:
        entry = manifests[path.parent].get(path.name)
        if entry is None:
            raise DataError(
                f"{path.parent / MANIFEST_NAME} doesn't list {path.name}",
                f"make a new manifest: swinv2-scale shards index {path.parent}",
            )
        entries.append(entry)
    return ShardSet(tuple(paths), tuple(entries))


def read_manifest(folder: Path) -> dict[str, ShardEntry]:
    """Entries of ``folder/manifest.json`` by file name.

    Raises:
        DataError: missing, or not a manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise DataError(f"{path} has format {data['format']!r}, this version reads {_FORMAT!r}")
        return {item["name"]: ShardEntry(**item) for item in data["shards"]}
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {MANIFEST_NAME}", f"make one: swinv2-scale shards index {folder}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a manifest: {error!r}", "make a new one: swinv2-scale shards index") from error


def write_manifest(folder: Path, entries: Iterable[ShardEntry], made_by: str) -> None:
    """Write ``folder/manifest.json``, whole or not at all."""
    data = {"format": _FORMAT, "made_by": made_by, "shards": [asdict(e) for e in entries]}
    part = folder / (MANIFEST_NAME + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST_NAME)


def index_shard(path: Path) -> ShardEntry:
    """Read a tar once, write its index, and say what is in it.

    Raises:
        DataError: not a complete tar, a member that is no file, or a sample whose files don't follow each other.
    """
    ranges = _sample_ranges(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        with index_path(path).open("wb") as index:
            for start, length in ranges:
                file.seek(start)
                index.write(INDEX_ENTRY.pack(start, length, zlib.crc32(file.read(length))))
    return ShardEntry(path.name, len(ranges), path.stat().st_size, digest.hexdigest())


def _sample_ranges(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of each sample's consecutive members."""
    ranges: list[tuple[int, int]] = []
    names: set[str] = set()
    keys: set[str] = set()
    current, end = "", 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                if member.isdir():
                    end = member.offset_data
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DataError(
                        f"{path}: {member.name!r} is no plain file (a link, sparse, ..); shards hold files only"
                    )
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key = sample_key(member.name)
                is_next = bool(ranges) and key == current
                if member.name in names or (not is_next and key in keys):
                    raise DataError(f"{path}: sample {key!r} is there twice, or its files don't follow each other")
                names.add(member.name)
                keys.add(key)
                current = key
                if is_next:
                    ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
                else:
                    ranges.append((member.offset, end - member.offset))
        with path.open("rb") as file:
            file.seek(end)
            tail = file.read()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is not a whole tar, damaged after {len(ranges)} samples: {error}") from error
    # tarfile takes a file that ends early, or a block that is no header, for the end of the archive.
    if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
        raise DataError(f"{path} is cut or damaged after {len(ranges)} samples", "copy it again")
    return ranges


def sample_key(name: str) -> str:
    """A member's name up to the first dot of its last part, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
