"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed.

And files from outside, of which not even their kind can be relied on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import IO, Any


def open_plain(path: Path) -> BufferedReader:
    """Open a file for reading; a link to one too.

    Raises:
        OSError: as ``open``; also what isn't a plain file: from a pipe nothing may ever come, from a device all.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return open(handle, "rb")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a machine that loses power, sees the old one or the new one.

    Args:
        content: text is written as UTF-8.

    Raises:
        OSError: it can't be written; what was there is untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # never through a link that somebody laid there
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            sync_file(file)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def sync_file(file: IO[Any]) -> None:
    """Make what has been written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
