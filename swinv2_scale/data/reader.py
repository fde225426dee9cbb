"""One sample of a shard: one index entry, one byte range, checked, parsed in memory."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from swinv2_scale.data.manifest import INDEX_ENTRY, ShardSet, index_path, sample_key
from swinv2_scale.errors import DataError

_MAX_OPEN_FILES = 128


@dataclass(frozen=True)
class Record:
    """The undecoded files of one sample."""

    id: str  # of the shard's content and the key: unique in the data set, wherever the shards lie
    name: str  # path and key, for people
    files: dict[str, bytes]  # by extension, lower case, without the leading dot


class ShardReader:
    """Reads samples of a ShardSet by (shard, index). Nothing is fast-forwarded, nothing is kept in memory.

    Attributes:
        bytes_read: bytes that were asked from disk so far, indexes included.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.bytes_read = 0
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard: int, index: int) -> Record:
        """
        Raises:
            DataError: the shard is gone, shorter than its index says, or a byte of the sample has changed.
        """
        path = self.shards.paths[shard]
        entry = self._pread(index_path(path), INDEX_ENTRY.size, index * INDEX_ENTRY.size)
        offset, length, checksum = INDEX_ENTRY.unpack(entry)
        if offset + length > self.shards.entries[shard].bytes:
            raise DataError(
                f"{index_path(path)} is damaged: sample {index} would end outside the shard",
                f"make it anew: swinv2-scale shards index {path.parent}",
            )
        data = self._pread(path, length, offset)
        if zlib.crc32(data) != checksum:
            raise DataError(
                f"{path}: sample {index} (bytes {offset} to {offset + length}) is damaged: its checksum differs",
                "copy the shard again",
            )
        return self._parse(shard, data)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _pread(self, path: Path, length: int, offset: int) -> bytes:
        try:
            if path not in self._open:
                if len(self._open) >= _MAX_OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(path)
            data = os.pread(self._open[path], length, offset)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}", "copy the shard again") from error
        self.bytes_read += len(data)
        if len(data) != length:
            raise DataError(f"{path} is truncated: wanted {length} bytes at {offset}, got {len(data)}")
        return data

    def _parse(self, shard: int, data: bytes) -> Record:
        files: dict[str, bytes] = {}
        key = ""
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    key = sample_key(member.name)
                    files[member.name[len(key) + 1 :].lower()] = content.read()
        return Record(f"{self.shards.shard_ids[shard]}/{key}", f"{self.shards.paths[shard]}: {key}", files)

    def __getstate__(self) -> dict[str, object]:
        # Loader workers that are spawned get a reader of their own: file descriptors don't travel.
        return {"shards": self.shards, "bytes_read": 0, "_open": OrderedDict()}
