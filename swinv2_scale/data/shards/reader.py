"""One sample of a shard: one index entry, one byte range, checked, parsed in memory."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.shards.manifest import (
    INDEX_ENTRY,
    INDEX_SUFFIX,
    MAX_SAMPLE_BYTES,
    is_part_of_a_sample,
    sample_key,
)
from swinv2_scale.data.shards.shard_set import ShardSet
from swinv2_scale.errors import DataError, SampleError

_MAX_OPEN_FILES = 128
_BLOCK = tarfile.BLOCKSIZE
#: The file is gone, or its disk can't give these bytes.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EIO)
_MAGIC = (b"ustar\x0000", b"ustar  \0")  # POSIX, GNU


@dataclass(frozen=True)
class Record:
    """The undecoded files of one sample."""

    id: str  # of the shard's content and the key: unique in the data set, wherever the shards lie
    name: str  # location and key, for people
    files: dict[str, bytes]  # by extension, lower case, without the leading dot
    key: str = ""  # as in the tar; from outside, so never a path


class ShardReader:
    """Reads samples of a ShardSet by (shard, index). Nothing is fast-forwarded, nothing is kept in memory.

    Attributes:
        bytes_read: bytes that were asked from disk or store so far, indexes included.
    """

    def __init__(self, shards: ShardSet, remote: RemoteFiles | None = None) -> None:
        self.shards = shards
        self.remote = remote or RemoteFiles(RemoteConfig())
        self.bytes_read = 0
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: int, index: int) -> Record:
        """
        Raises:
            SampleError: the shard is gone, shorter than its index says, or a byte of the sample has changed.
            DataError: a store doesn't answer, or the disk can't be read at the moment.
        """
        offset, length, checksum = self._index_entry(shard, index)
        data = self._shard_bytes(shard, offset, length)
        if zlib.crc32(data) != checksum and is_remote(self.shards.locations[shard]):
            # Perhaps only the copy here is damaged.
            self.remote.forget(self.shards.entries[shard].sha256, offset, length)
            data = self._shard_bytes(shard, offset, length)
        if zlib.crc32(data) != checksum:
            raise SampleError(
                f"{self.shards.names[shard]}: sample {index} (bytes {offset} to {offset + length}) is damaged: its "
                "checksum differs",
                "copy the shard again",
            )
        files: dict[str, bytes] = {}
        key = ""
        try:
            for name, content in _members(data):
                if is_part_of_a_sample(name):
                    key = sample_key(name)
                    files[name[len(key) + 1 :].lower()] = content
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise SampleError(
                f"{self.shards.names[shard]}: sample {index} is no part of a tar: {error}", "index the shard again"
            ) from error
        return Record(f"{self.shards.shard_ids[shard]}/{key}", f"{self.shards.names[shard]}: {key}", files, key)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _index_entry(self, shard: int, index: int) -> tuple[int, int, int]:
        location, entry = self.shards.index_locations[shard], self.shards.entries[shard]
        whole = entry.samples * INDEX_ENTRY.size
        data = self._read(location, entry.sha256 + INDEX_SUFFIX, whole, index * INDEX_ENTRY.size, INDEX_ENTRY.size)
        offset, length, checksum = INDEX_ENTRY.unpack(data)
        if offset + length > entry.bytes or length > MAX_SAMPLE_BYTES:
            if is_remote(location):
                self.remote.forget(entry.sha256 + INDEX_SUFFIX, index * INDEX_ENTRY.size, INDEX_ENTRY.size)
            raise SampleError(
                f"{location} is damaged: sample {index} would have {length} bytes at {offset} of {entry.bytes}",
                f"make it anew: swinv2-scale shards index {self.shards.locations[shard]}",
            )
        return offset, length, checksum

    def _shard_bytes(self, shard: int, offset: int, length: int) -> bytes:
        entry = self.shards.entries[shard]
        return self._read(self.shards.locations[shard], entry.sha256, entry.bytes, offset, length)

    def _read(self, location: str, identity: str, size: int, offset: int, length: int) -> bytes:
        if is_remote(location):
            data = self.remote.read(location, identity, size, offset, length)
        else:
            data = self._pread(local_path(location), length, offset)
        self.bytes_read += len(data)
        if len(data) != length:
            raise SampleError(f"{location} is truncated: wanted {length} bytes at {offset}, got {len(data)}")
        return data

    def _pread(self, path: str, length: int, offset: int) -> bytes:
        try:
            if path not in self._open:
                if len(self._open) >= _MAX_OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(path)
            return os.pread(self._open[path], length, offset)
        except OSError as error:
            if error.errno in _DAMAGE:
                raise SampleError(f"{path} cannot be read: {error}", "copy the shard again") from error
            # A network folder that is away, no memory, no permission: whole samples must not be taken for damaged.
            raise DataError(f"{path} cannot be read: {error}", "see whether this node can read it now") from error

    def __getstate__(self) -> dict[str, object]:
        # Loader workers that are spawned get a reader of their own: file descriptors don't travel.
        return {"shards": self.shards, "remote": self.remote, "bytes_read": 0, "_open": OrderedDict()}


def _members(data: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of the files in a sample's bytes, whose checksum was right.

    tarfile takes longer for this than decoding a small image does; it reads what isn't plain ustar.
    """
    members = []
    start = 0
    while start + _BLOCK <= len(data):
        header = data[start : start + _BLOCK]
        size_text = header[124:136].rstrip(b"\0 ")
        magic = header[257:265]
        if header[156:157] not in b"0\0" or magic not in _MAGIC or not size_text.isdigit():
            return list(_tarfile_members(data))
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if magic == _MAGIC[0] else b""
        size = int(size_text, 8)
        first = start + _BLOCK
        start = first + -(-size // _BLOCK) * _BLOCK
        full_name = prefix + b"/" + name if prefix else name
        members.append((full_name.decode("utf-8", "surrogateescape"), data[first : first + size]))
    return members


def _tarfile_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()
