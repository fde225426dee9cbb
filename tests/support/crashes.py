"""What a disk may hold after a crash: a recorded list of file operations, replayed up to any of them.

Promised by POSIX, and no more is assumed: a file's bytes are safe after fsync of the file, a name (new, renamed or
removed) after fsync of the folder that holds it, a rename happens wholly or not at all. All else may have reached the
disk or not, in any order: some of the names, some of the pages, a file's length without its bytes.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

PAGE = 4096
#: Files by path; a folder ends with "/" and has no bytes.
Tree = dict[str, bytes]


@dataclass(eq=False)
class File:
    """Bytes as they are, and as they are sure to survive."""

    now: bytes = b""
    safe: bytes = b""


@dataclass(eq=False)
class Folder:
    """Names as they are, and as they are sure to survive."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """Names that appear (with what they name) or go (None), together or not at all."""

    names: tuple[tuple[Folder, str, File | Folder | None], ...]


class Disk:
    """A folder that was empty and safe at first."""

    def __init__(self) -> None:
        self.root = Folder()
        self._unsafe: list[_Change] = []

    def apply(self, operation: dict[str, Any]) -> None:
        """One line of a FileTrace."""
        kind, path = operation["do"], operation.get("path", "")
        if kind == "mark":
            return
        if kind == "create":
            self._change((path, File()))
        elif kind == "mkdir":
            self._change((path, Folder()))
        elif kind == "unlink":
            self._change((path, None))
        elif kind == "rename":
            self._change((path, None), (operation["to"], self._find(path)))
        elif kind == "link":
            self._change((operation["to"], self._find(path)))
        elif kind == "fsync":
            self._make_safe(self._find(path))
        else:
            file = self._find(path)
            assert isinstance(file, File), path
            if kind == "truncate":
                file.now = file.now[: operation["size"]].ljust(operation["size"], b"\0")
            else:
                assert kind == "write", kind
                data, offset = base64.b64decode(operation["data"]), operation["offset"]
                file.now = file.now[:offset].ljust(offset, b"\0") + data + file.now[offset + len(data) :]

    def states(self, rng: random.Random, num_mixed: int) -> Iterator[tuple[str, Tree]]:
        """What a crash here may leave: all, only what is safe, and so many random mixtures."""
        yield "all", self._tree("all", rng)
        yield "safe", self._tree("safe", rng)
        for _ in range(num_mixed):
            yield "mixed", self._tree("mixed", rng)

    def tree(self) -> Tree:
        """As a reader sees it now."""
        return self._tree("all", random.Random())

    def _tree(self, survives: Literal["all", "safe", "mixed"], rng: random.Random) -> Tree:
        names: dict[Folder, dict[str, File | Folder]] = {}
        if survives == "mixed":
            share = rng.random()
            for change in self._unsafe:
                if rng.random() < share:
                    for folder, name, entry in change.names:
                        _set(names.setdefault(folder, dict(folder.safe)), name, entry)
        tree: Tree = {}
        left: list[tuple[str, Folder]] = [("", self.root)]
        while left:
            path, folder = left.pop()
            entries = folder.now if survives == "all" else names.get(folder, folder.safe)
            for name, entry in entries.items():
                if isinstance(entry, Folder):
                    tree[f"{path}{name}/"] = b""
                    left.append((f"{path}{name}/", entry))
                else:
                    tree[path + name] = _surviving(entry, survives, rng)
        return tree

    def _find(self, path: str) -> File | Folder:
        entry: File | Folder = self.root
        for part in PurePosixPath(path).parts:
            assert isinstance(entry, Folder), path
            entry = entry.now[part]
        return entry

    def _change(self, *paths: tuple[str, File | Folder | None]) -> None:
        names = []
        for path, entry in paths:
            folder = self._find(str(PurePosixPath(path).parent))
            assert isinstance(folder, Folder)
            _set(folder.now, PurePosixPath(path).name, entry)
            names.append((folder, PurePosixPath(path).name, entry))
        self._unsafe.append(_Change(tuple(names)))

    def _make_safe(self, entry: File | Folder) -> None:
        if isinstance(entry, File):
            entry.safe = entry.now
            return
        for change in [c for c in self._unsafe if any(folder is entry for folder, _, _ in c.names)]:
            for folder, name, named in change.names:
                _set(folder.safe, name, named)
            self._unsafe.remove(change)


def _set(names: dict[str, File | Folder], name: str, entry: File | Folder | None) -> None:
    if entry is None:
        names.pop(name, None)
    else:
        names[name] = entry


def _surviving(file: File, survives: str, rng: random.Random) -> bytes:
    if survives == "all" or file.now == file.safe:
        return file.now
    if survives == "safe":
        return file.safe
    now, safe = file.now, file.safe.ljust(len(file.now), b"\0")
    pages = range(0, len(now), PAGE)
    some = b"".join((now if rng.random() < 0.5 else safe)[start : start + PAGE] for start in pages)
    return rng.choice([file.safe, now, now[: rng.randrange(len(now) + 1)], bytes(len(now)), some])
