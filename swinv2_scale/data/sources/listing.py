"""What a source holds: its samples by name, and the small things that are known before an image is read."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swinv2_scale.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """One sample of a source, not read yet. A million of them take 0.4 GB.

    Attributes:
        key: its name in the tar: readable, unique, without dots.
        files: paths below the source's root; the first is the image or the clip, a second one is its mask.
        label: class, where there is one.
        json: what else is known about it, encoded.
    """

    key: str
    files: tuple[str, ...]
    label: int | None = None
    json: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A data set before it is written.

    Attributes:
        root: what the items' paths start from.
        items: in the source's own order.
        schema: for the manifest: ``classes`` in the order of labels, and what else the data set defines.
        notes: what a person should know about what was found, one sentence each.
        max_mask_value: of the masks, where there are any.
    """

    root: Path
    items: list[Item]
    schema: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    max_mask_value: int = 255


class Keys:
    """Makes keys of paths: each path in turn gets one that no other has."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, path: str) -> str:
        """``path`` without its extension.

        Dots become ``_``, since WebDataset cuts a name at its first one; control characters too. Bytes that are no
        UTF-8 are written as ``%E9``. If the key is taken, a number is put behind it.
        """
        stem = os.path.splitext(path)[0].replace(".", "_").strip("/") or "_"
        name = "".join(_readable(character) for character in stem)
        if re.match("__[^/]*__/", name):  # WebDataset passes over those
            name = name[1:]
        key, number = name, 1
        while key in self._taken:
            number += 1
            key = f"{name}-{number}"
        self._taken.add(key)
        return key


def _readable(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"%{ord(character) - 0xDC00:02X}"
    return "_" if ord(character) < 32 or ord(character) == 127 else character


def extension_of(path: str) -> str:
    return os.path.splitext(path)[1].lower().removeprefix(".")


def files_below(folder: Path, wanted: Callable[[str], bool], others: Counter[str]) -> Iterator[str]:
    """Paths, relative to ``folder``, of all files whose lower-case extension is wanted, in the order of names.

    Links are followed, except into a folder that the link itself lies in. Hidden files and folders are left out
    (``._x.jpg`` of macOS, ``.ipynb_checkpoints``); files with other extensions are counted in ``others``.

    Raises:
        DataError: a folder can't be read.
    """

    def below(path: str, prefix: str, inside: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            with os.scandir(path) as scan:
                entries = sorted((entry for entry in scan if entry.name[0] != "."), key=lambda entry: entry.name)
            for entry in entries:
                if entry.is_dir():
                    stat = entry.stat()
                    identity = stat.st_dev, stat.st_ino
                    if identity not in inside:
                        yield from below(entry.path, f"{prefix}{entry.name}/", inside | {identity})
                elif wanted(extension_of(entry.name)):
                    yield prefix + entry.name
                else:
                    others[extension_of(entry.name)] += 1
        except OSError as error:
            raise DataError(f"cannot list {path}: {error}") from error

    yield from below(str(folder), "", frozenset())


def note_others(others: Counter[str]) -> list[str]:
    if not others:
        return []
    kinds = ", ".join(f"{count} .{name}" if name else f"{count} without" for name, count in others.most_common(5))
    return [f"{others.total()} files were left out because of their extension: {kinds}"]


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; none if it isn't there."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def locate(folder: Path, *markers: str) -> Path:
    """``folder``, or the one folder in it, that has one of the paths ``markers``.

    Raises:
        DataError: neither has; names what was looked for.
    """
    candidates = [folder, *(folder / name for name in subfolders(folder))]
    for candidate in candidates:
        if any((candidate / marker).exists() for marker in markers):
            return candidate
    raise DataError(
        f"{folder} has no {' or '.join(markers)}, nor has a folder in it",
        "give the folder that the data set was unpacked to, or another --from (see swinv2-scale shards write --help)",
    )


def first_existing(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def read_rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header, by column.

    Raises:
        DataError: it can't be read, or lacks one of the columns.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                found = ",".join(reader.fieldnames or ()) or "nothing"
                raise DataError(f"{path} has no column {', '.join(missing)}; its first line is {found}")
            for row in reader:
                yield {name: value or "" for name, value in row.items() if name is not None}
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_text(path: Path) -> str:
    """
    Raises:
        DataError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")
