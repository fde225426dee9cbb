"""A shard from its beginning to its end, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.shards.tar_walk import Readable
from swinv2_scale.durable import open_plain


@contextmanager
def open_shard(location: str, remote: RemoteFiles) -> Iterator[Readable]:
    """A shard, to be read once from its beginning to its end."""
    if is_remote(location):
        with closing(remote.stream(location)) as pieces:
            yield _Pieces(pieces)
    else:
        with open_plain(Path(local_path(location))) as file:
            yield file


class _Pieces:
    """An iterator of bytes as something to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def read(self, size: int, /) -> bytes:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._left = memoryview(piece)
        taken, self._left = self._left[:size], self._left[size:]
        return bytes(taken)
