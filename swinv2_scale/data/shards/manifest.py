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
import re
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swinv2_scale.config.run import DataConfig, RemoteConfig
from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.remote.pipe import PIPE_PREFIX
from swinv2_scale.durable import open_plain, write_whole
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


def read_manifest(folder: str, remote: RemoteFiles | None = None) -> Manifest:
    """The manifest of a folder, a URL or (always missing) a command.

    Raises:
        DataError: missing, damaged, or not a manifest.
    """
    return parse_manifest(manifest_text(folder, remote), f"{folder}/{MANIFEST_NAME}")


def manifest_text(folder: str, remote: RemoteFiles | None = None) -> str:
    """What ``read_manifest`` parses.

    Raises:
        DataError: missing, or no text.
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
            return remote.read_whole(where, _MAX_MANIFEST_BYTES).decode("utf-8")
        with open_plain(Path(local_path(where))) as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        raise missing from None
    except (OSError, ValueError) as error:
        raise _no_manifest(where, error) from error


def parse_manifest(text: str, where: str) -> Manifest:
    """
    Args:
        where: the text is from, for messages.

    Raises:
        DataError: damaged, or not a manifest.
    """
    try:
        data = json.loads(text)
        if data["format"] == _FIRST_FORMAT:
            data |= {"made_by": {"command": data["made_by"]}, "schema": {}}
        elif data["format"] != _FORMAT:
            raise DataError(f"{where} has format {data['format']!r}, this version reads {_FORMAT!r}")
        elif data.pop("digest") != _digest(data):
            raise DataError(f"{where} is damaged: its digest differs", "copy it again, or: swinv2-scale shards index")
        entries = {item["name"]: ShardEntry(**item) for item in data["shards"]}
        return Manifest(entries, data["made_by"], data["schema"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_manifest(where, error) from error


def _no_manifest(where: str, error: Exception) -> DataError:
    return DataError(f"{where} is not a manifest: {error!r}", "make a new one: swinv2-scale shards index")


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
