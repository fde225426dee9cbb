"""Blocks of remote files on a disk of this node, shared by its processes and never larger than was allowed.

``FOLDER/SHA256SUFFIX.NUMBER.block`` holds one block and then a CRC-32 (little-endian uint32) of each 64 KiB of it, so
that a read checks what it takes and no more. Locks are flock's: the kernel frees them when a process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swinv2_scale.errors import ConfigError, DataError, OutputError
from swinv2_scale.telemetry.console import log

_IDENTITY = re.compile(r"[0-9a-f]{64}[A-Za-z0-9._-]{0,32}")
_SUFFIX = ".block"
_PART = "unfinished.part"
_PIECE = 64 * 2**10
_NUM_LOCKS = 256
_DISK_PAGE = 4096  # what a file takes on disk is rounded up to it


def block_name(identity: str, number: int) -> str:
    """The file name of a block.

    Raises:
        DataError: the identity, which comes from a manifest, is not a SHA-256 in hex and at most a short suffix.
    """
    if not _IDENTITY.fullmatch(identity):
        raise DataError(
            f"{identity!r} is not the SHA-256 of a shard", "make the manifest anew: swinv2-scale shards index"
        )
    return f"{identity}.{number:08d}{_SUFFIX}"


class BlockCache:
    """Blocks by name. The folder is made on the first ``put`` or ``fetching``; a disk of this node is meant.

    Args:
        max_bytes: what the folder takes on disk, unfinished files included, is at no moment more.
        block_bytes: the largest block.
        num_readers: processes that share the folder; there must be room for a block of each.

    Raises:
        ConfigError: there isn't.
    """

    def __init__(self, folder: Path, max_bytes: int, block_bytes: int, num_readers: int = 1) -> None:
        least = num_readers * _on_disk(block_bytes) + _DISK_PAGE
        if max_bytes < least:
            raise ConfigError(
                f"data.remote.cache_bytes is {max_bytes}: {num_readers} processes that read blocks of {block_bytes} "
                f"bytes need {least} at least",
                f"set data.remote.cache_bytes={least} or more",
            )
        self._folder = folder
        self._block_bytes = block_bytes
        self._capacity = max_bytes - _DISK_PAGE  # the page holds the count of bytes in use
        self._is_short_of_disk = False  # said once
        self._counted_by = 0  # the process that has counted the folder's bytes itself

    def holds(self, size: int) -> bool:
        """Whether all blocks of a file of so many bytes can be here at once."""
        return -(-size // self._block_bytes) * _on_disk(self._block_bytes) <= self._capacity

    def get(self, name: str, length: int, start: int, stop: int) -> bytes | None:
        """Bytes ``start`` to ``stop`` of a block of ``length`` bytes; None if it isn't here, or damaged there."""
        first, last = start // _PIECE, -(-stop // _PIECE)
        try:
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise self._refused(error) from error
        try:
            data = os.pread(handle, min(last * _PIECE, length) - first * _PIECE, first * _PIECE)
            sums = os.pread(handle, 4 * (last - first), length + 4 * first)
            with contextlib.suppress(PermissionError):  # another user's file: it goes as if it had not been used
                _mark_used(handle)
        except OSError as error:  # a bad sector
            log().warning("%s cannot be read (%s); it is fetched again", self._folder / name, error)
            return None
        finally:
            os.close(handle)
        if sums != _checksums(data) or len(data) < stop - first * _PIECE:
            log().warning("%s is damaged between byte %d and %d; it is fetched again", self._folder / name, start, stop)
            return None
        return data[start - first * _PIECE : stop - first * _PIECE]

    def put(self, name: str, data: bytes) -> None:
        """Keep a block, whole or not at all; blocks that were used longest ago make room.

        A full disk takes room away from the cache: it shrinks until the block fits.

        Raises:
            OutputError: the folder can't be written, or the disk is full though the cache is empty.
        """
        path, part = self._folder / name, self._folder / _PART
        content = data + _checksums(data)
        room = _on_disk(len(data))
        with self._space() as ledger:
            used = self._used(ledger) - _remove(path)
            if used + room > self._capacity:
                # Some more than needed, so that a large folder isn't listed for each block.
                used = self._evict(min(self._capacity - room, self._capacity * 15 // 16))
            while True:
                # Counted first: a process killed here leaves too high a count, never one too low. What it leaves of the
                # file is overwritten by the next, because nobody writes without this lock.
                _count(ledger, used + room)
                try:
                    _write(part, content)
                    part.rename(path)
                    return
                except OSError as error:
                    _remove(part)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or used == 0:
                        raise
                    used = self._evict(max(0, used - max(room, used // 16)))
                    if not self._is_short_of_disk:
                        log().warning("%s: its disk is full; the cache stays below %d bytes", self._folder, used + room)
                    self._is_short_of_disk = True

    def drop(self, name: str) -> None:
        """Forget a block; no error if it isn't here."""
        if (self._folder / name).exists():
            with self._space() as ledger:
                used = self._used(ledger)
                _count(ledger, used - _remove(self._folder / name))

    @contextmanager
    def fetching(self, name: str) -> Iterator[None]:
        """While one process is in here for a name, the others that want it wait, and find its block afterwards.

        Names share 256 locks, so that a process may wait for another block's download too.
        """
        with self._locked(f"{zlib.crc32(name.encode()) % _NUM_LOCKS:02x}"):
            yield

    @contextmanager
    def _space(self) -> Iterator[int]:
        """The right to add and remove blocks, and the open file that their bytes are counted in."""
        try:
            with self._locked("space") as ledger:
                yield ledger
        except OSError as error:
            raise self._refused(error) from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """The lock file, open and locked. Opened anew each time: threads and forked children exclude each other too."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._refused(error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a network folder whose server knows no locks
                raise self._refused(error) from error
            yield handle
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # not by close alone: a child forked meanwhile has the file open too
            os.close(handle)

    def _used(self, ledger: int) -> int:
        """Bytes of all blocks: as the last writer counted them, except that each process first counts them itself.

        After a power cut, or when somebody tidied the folder by hand, the number on disk may be wrong.
        """
        count = os.pread(ledger, 8, 0)
        if self._counted_by == os.getpid() and len(count) == 8:
            return int(struct.unpack("<Q", count)[0])
        self._counted_by = os.getpid()
        return self._evict(self._capacity)

    def _evict(self, limit: int) -> int:
        """Remove blocks, the one used longest ago first, until at most ``limit`` bytes are left; returns how many."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # somebody tidies by hand
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, entry.path, _rounded(status.st_size)))
        _remove(self._folder / _PART)
        left = sum(size for _, _, size in found)
        for _, path, _ in sorted(found):
            if left <= limit:
                break
            left -= _remove(Path(path))
        return left

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"the cache of remote shards, {self._folder}, can't be used: {error.strerror or error}",
            "free space or permissions there, or set data.remote.cache_dir to a folder on a disk of this node",
        )


def _mark_used(handle: int) -> None:
    # Modification times, because access times are off or coarse on most disks.
    os.utime(handle, ns=(time.time_ns(),) * 2)


def _count(ledger: int, used: int) -> None:
    os.pwrite(ledger, struct.pack("<Q", max(0, used)), 0)


def _checksums(data: bytes) -> bytes:
    """CRC-32 of each piece, one after the other, as the end of a block's file has them."""
    view = memoryview(data)
    return b"".join(struct.pack("<I", zlib.crc32(view[i : i + _PIECE])) for i in range(0, len(data), _PIECE))


def _on_disk(length: int) -> int:
    """What a block of so many bytes takes on disk, its checksums included."""
    return _rounded(length + 4 * -(-length // _PIECE))


def _rounded(size: int) -> int:
    return -(-size // _DISK_PAGE) * _DISK_PAGE


def _remove(path: Path) -> int:
    """Bytes that this freed on disk; 0 where there was nothing."""
    try:
        size = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return _rounded(size)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        _mark_used(file.fileno())
