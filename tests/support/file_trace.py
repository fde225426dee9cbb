"""Record what a process does to the files below a folder, in order; several ranks and threads share one record.

Recorded where Python meets the kernel: the functions of ``os`` that change files, which pathlib, shutil and tempfile
call too; ``open`` becomes ``_pyio``'s, which calls them as well; and ``io.FileIO``'s subclasses. What writes past
Python (torch's or Rust's own files) would be missing; then the record doesn't replay to the folder that is there, which
is what tests/faults/test_crash_consistency.py looks at first. Compared once with strace: see there.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import base64
import builtins
import fcntl
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Nothing of ours uses these; whoever does has to teach the record, or crashes wouldn't be replayed.
UNKNOWN = ("writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "symlink", "mknod", "mkfifo", "sync")


class FileTrace:
    """Appends one JSON line for each operation on something below a folder.

    Args:
        root: the folder; it has to exist, and its own name isn't part of the trace.
        record: the file of lines; the same for all ranks, outside of the folder.
    """

    def __init__(self, root: Path, record: Path) -> None:
        self._root = os.path.realpath(root)
        self._record = os.open(record, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._lock = threading.RLock()
        self._write, self._open = os.write, os.open
        self._is_inside = False

    def install(self) -> None:
        """From now on, to this process's end."""
        for name in ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "truncate"):
            self._wrap(os, name, getattr(self, f"_{name}_path"))
        for name in ("write", "pwrite", "fsync", "fdatasync", "ftruncate"):
            self._wrap(os, name, getattr(self, f"_{name}_handle"))
        for name in UNKNOWN:
            self._wrap(os, name, self._refuse)
        for subclass in io.FileIO.__subclasses__():
            if subclass.__module__ != "_pyio":
                self._wrap(subclass, "__init__", self._init_file)
                self._wrap(subclass, "write", self._write_file)
                self._wrap(subclass, "truncate", self._refuse)
        io.FileIO = _pyio.FileIO  # type: ignore[misc]
        builtins.open = io.open = _pyio.open

    def mark(self, text: str) -> None:
        """Say where the process stands."""
        with self._alone():
            self._say("mark", text=text)

    def _wrap(self, owner: Any, name: str, traced: Callable[..., Any]) -> None:
        usual = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            with self._alone() as is_outermost:
                return traced(usual, *args, **kwargs) if is_outermost else usual(*args, **kwargs)

        setattr(owner, name, function)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """No other thread or rank does anything to files meanwhile: the record's order is the kernel's."""
        with self._lock:
            if self._is_inside:
                yield False
                return
            self._is_inside = True
            fcntl.flock(self._record, fcntl.LOCK_EX)
            try:
                yield True
            finally:
                fcntl.flock(self._record, fcntl.LOCK_UN)
                self._is_inside = False

    def _say(self, operation: str, **facts: Any) -> None:
        line = json.dumps({"do": operation, **facts}).encode() + b"\n"
        assert self._write(self._record, line) == len(line)

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the folder, None if it is elsewhere."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            start = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            full = os.path.normpath(os.path.join(start, os.fsdecode(path)))
        return os.path.relpath(full, self._root) if full.startswith(self._root) else None

    # Each of the following does what ``usual`` does, and says it when it was done.

    def _open_path(self, usual: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._inside(path, dir_fd)
        existed = os.path.lexists(os.path.join(self._root, name)) if name else False
        handle: int = usual(path, flags, mode, dir_fd=dir_fd)
        if name and flags & os.O_CREAT and not existed:
            self._say("create", path=name)
        elif name and flags & os.O_TRUNC:
            self._say("truncate", path=name, size=0)
        return handle

    def _mkdir_path(self, usual: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        usual(path, mode, dir_fd=dir_fd)
        if name := self._inside(path, dir_fd):
            self._say("mkdir", path=name)

    def _rename_path(
        self, usual: Any, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        old, new = self._inside(src, src_dir_fd), self._inside(dst, dst_dir_fd)
        assert (old is None) == (new is None), f"{src} is renamed across the folder's edge, to {dst}"
        usual(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if old:
            self._say("rename", path=old, to=new)

    _replace_path = _rename_path

    def _unlink_path(self, usual: Any, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._inside(path, dir_fd)
        usual(path, dir_fd=dir_fd)
        if name:
            self._say("unlink", path=name)

    _remove_path = _rmdir_path = _unlink_path

    def _link_path(self, usual: Any, src: Any, dst: Any, **options: Any) -> None:
        old, new = self._inside(src, options.get("src_dir_fd")), self._inside(dst, options.get("dst_dir_fd"))
        assert (old is None) == (new is None), f"{src} is linked across the folder's edge, as {dst}"
        usual(src, dst, **options)
        if old:
            self._say("link", path=old, to=new)

    def _truncate_path(self, usual: Any, path: Any, length: int) -> None:
        usual(path, length)
        if name := self._inside(path):
            self._say("truncate", path=name, size=length)

    _ftruncate_handle = _truncate_path

    def _write_handle(self, usual: Any, handle: int, data: Any) -> int:
        name = self._inside(handle)
        if name is None:
            return int(usual(handle, data))
        is_appending = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_APPEND
        offset = os.fstat(handle).st_size if is_appending else os.lseek(handle, 0, os.SEEK_CUR)
        return self._written(name, offset, data, int(usual(handle, data)))

    def _pwrite_handle(self, usual: Any, handle: int, data: Any, offset: int) -> int:
        done = int(usual(handle, data, offset))
        name = self._inside(handle)
        return self._written(name, offset, data, done) if name else done

    def _fsync_handle(self, usual: Any, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        usual(number)
        if name := self._inside(number):
            self._say("fsync", path=name)

    _fdatasync_handle = _fsync_handle

    def _init_file(self, usual: Any, file: io.FileIO, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
        name = self._inside(path)
        existed = os.path.lexists(os.path.join(self._root, name)) if name else False
        usual(file, path, mode, *args, **kwargs)
        if name and not existed:
            self._say("create", path=name)
        elif name and "w" in mode:
            self._say("truncate", path=name, size=0)

    def _write_file(self, usual: Any, file: io.FileIO, data: Any) -> int:
        name, offset = self._inside(file.fileno()), file.tell()
        done = int(usual(file, data))
        return self._written(name, offset, data, done) if name else done

    def _written(self, name: str, offset: int, data: Any, count: int) -> int:
        content = bytes(memoryview(data).cast("B")[:count])
        self._say("write", path=name, offset=offset, data=base64.b64encode(content).decode())
        return count

    def _refuse(self, usual: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the trace of files doesn't know {usual}; teach it, or use something else")
