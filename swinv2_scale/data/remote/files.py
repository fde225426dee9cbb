"""Shards that lie in a store: byte ranges through the node's block cache, asked for again when the network fails.

``http(s)://``, ``s3://`` and ``gs://`` go through fsspec (stores.py; extra "remote"), one request for each block;
``pipe:COMMAND`` starts one program (pipe.py), once for all blocks of a shard.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.remote.cache import BlockCache, block_name
from swinv2_scale.data.remote.pipe import PIPE_PREFIX, pipe_command, pipe_output
from swinv2_scale.data.remote.stores import cause, failure, http_range, may_pass, new_filesystem, without_secrets
from swinv2_scale.errors import ConfigError, DataError, SampleError, ScaleError
from swinv2_scale.telemetry.console import log

BLOCK_BYTES = 4 * 2**20
_MAX_WAIT_S = 30.0

T = TypeVar("T")


def is_remote(location: str) -> bool:
    """``pipe:..`` or ``scheme://``; ``file://`` is local."""
    return location.startswith(PIPE_PREFIX) or ("://" in location and not location.startswith("file:"))


def local_path(location: str) -> str:
    """A path without the ``file://`` or ``file:`` before it; percent signs stay as they are."""
    return location.removeprefix("file:").removeprefix("//") if location.startswith("file:") else location


class RemoteFiles:
    """Files in stores. One for each process; forked and pickled ones open connections of their own.

    Every method asks again, ``options.retries`` times, when the store is silent for ``options.timeout_s``, breaks off,
    or answers 408, 425, 429 or 5xx; the waits double up to half a minute. What can't pass (401, 403, a missing package)
    fails at once.

    Args:
        first_wait_s: before the second try.
        num_readers: processes of this node that share the cache.

    Raises:
        ConfigError: the cache may not even hold one block of each reader.
    """

    def __init__(
        self, options: RemoteConfig, *, block_bytes: int = BLOCK_BYTES, first_wait_s: float = 0.5, num_readers: int = 1
    ) -> None:
        self._options = options
        self._block_bytes = block_bytes
        self._first_wait_s = first_wait_s
        self._cache = BlockCache(Path(options.cache_dir), options.cache_bytes, block_bytes, num_readers)
        # By process: a forked child has the parent's connections, but not the thread that serves them.
        self._filesystems: dict[tuple[int, str], Any] = {}

    def read(self, location: str, identity: str, size: int, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset`` of a file of ``size`` bytes, through the cache.

        Args:
            identity: SHA-256 of the content in hex and perhaps a short suffix, which is what the cache knows it by.

        Raises:
            DataError: the file is missing, may not be read, is too short, or its store doesn't answer.
            ConfigError: the command of a ``pipe:`` isn't allowed, or the cache can't hold what it gives.
            OutputError: the cache's folder can't be written.
        """
        assert 0 <= offset <= offset + length <= size, (offset, length, size)
        parts = []
        for number in self._block_numbers(offset, length):
            first = number * self._block_bytes
            block = min(self._block_bytes, size - first)
            start, stop = max(offset - first, 0), min(offset + length - first, block)
            name = block_name(identity, number)
            part = self._cache.get(name, block, start, stop)
            if part is None:
                # A command gives all blocks at once, so it is started for one of them only.
                with self._cache.fetching(identity if location.startswith(PIPE_PREFIX) else name):
                    part = self._cache.get(name, block, start, stop)  # another process was first
                    if part is None:
                        part = self._fetch_block(location, identity, size, number)[start:stop]
            parts.append(part)
        return b"".join(parts)

    def forget(self, identity: str, offset: int, length: int) -> None:
        """Drop these bytes from the cache, so that the next read asks the store: they turned out to be wrong."""
        for number in self._block_numbers(offset, length):
            self._cache.drop(block_name(identity, number))

    def read_whole(self, location: str, max_bytes: int) -> bytes:
        """A small file, past the cache.

        Raises:
            DataError: as ``read``; or it is larger than ``max_bytes``.
            ConfigError: as ``read``.
        """
        content = bytearray()
        with closing(self.stream(location)) as chunks:
            for chunk in chunks:
                content += chunk
                if len(content) > max_bytes:
                    raise DataError(
                        f"{without_secrets(location)} has more than {max_bytes} bytes, which is not expected of it"
                    )
        return bytes(content)

    def size(self, location: str) -> int | None:
        """Bytes of a file; None if it is missing.

        Raises:
            DataError: the store doesn't say, doesn't answer, or it is a ``pipe:``, which only tells by being read.
        """
        if location.startswith(PIPE_PREFIX):
            raise DataError(f"{location!r}: how many bytes a command gives isn't known before it has been run")
        found = self._retried(location, lambda: self._ask_size(location))
        if found is not None and found < 0:
            raise DataError(
                f"{without_secrets(location)}: the store doesn't say how many bytes it has",
                "use a server that sends Content-Length, or copy the shards",
            )
        return found

    def stream(self, location: str) -> Generator[bytes, None, None]:
        """The whole file in pieces, first to last, past the cache.

        A command that fails in the middle is not started again: what it gave is used already.

        Raises:
            DataError: as ``read``, also after some pieces.
            ConfigError: as ``read``.
        """
        if location.startswith(PIPE_PREFIX):
            try:
                with closing(
                    pipe_output(pipe_command(location, self._options.allowed_commands), self._options.timeout_s)
                ) as chunks:
                    yield from chunks
            except OSError as error:
                raise failure(location, error, 1) from error
            return
        size = self.size(location)
        if size is None:
            raise failure(location, FileNotFoundError("not found"), 1)
        for start in range(0, size, self._block_bytes):
            yield self._fetch(location, start, min(self._block_bytes, size - start), size)

    def list_names(self, folder_url: str) -> list[str] | None:
        """Sorted names of the files directly in a folder of s3 or gs; None where a store can't list (http, pipe).

        Raises:
            DataError: no such bucket or folder, not allowed, or the store doesn't answer.
        """
        if urlsplit(folder_url).scheme not in ("s3", "gs"):
            return None
        filesystem = self._filesystem(folder_url)
        found = self._retried(folder_url, lambda: filesystem.ls(folder_url, detail=True))
        return sorted(item["name"].rpartition("/")[2] for item in found if item["type"] == "file")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_filesystems": {}}

    def _block_numbers(self, offset: int, length: int) -> range:
        return range(offset // self._block_bytes, -(-(offset + length) // self._block_bytes) if length else 0)

    def _fetch_block(self, location: str, identity: str, size: int, number: int) -> bytes:
        if location.startswith(PIPE_PREFIX):
            return self._run_for_block(location, identity, size, number)
        start = number * self._block_bytes
        data = self._fetch(location, start, min(self._block_bytes, size - start), size)
        self._cache.put(block_name(identity, number), data)
        return data

    def _fetch(self, location: str, start: int, length: int, size: int) -> bytes:
        """A range of a file of known size from its store, whole; only HTTP tells that the file is larger."""
        filesystem, name = self._filesystem(location), without_secrets(location)

        def ask() -> bytes:
            if location.startswith("http"):
                data, found = http_range(filesystem, location, start, length)
                if found not in (size, -1):
                    raise SampleError(
                        f"{name} has {found} bytes, not the expected {size}",
                        "copy the shard again; if it was changed on purpose: swinv2-scale shards index",
                    )
                if data is None:
                    raise DataError(
                        f"{name}: the server ignores Range and would send the whole file for each sample",
                        "use a server that knows byte ranges (nginx, Apache, an object store), or copy the shards",
                    )
            else:
                data = filesystem.cat_file(location, start=start, end=start + length)
            if len(data) != length:
                raise EOFError(f"{len(data)} of {length} bytes came")
            return data

        return self._retried(location, ask)

    def _ask_size(self, location: str) -> int | None:
        """None: missing. -1: there, but its size isn't said."""
        filesystem = self._filesystem(location)
        try:
            if location.startswith("http"):
                return http_range(filesystem, location, 0, 1)[1]
            found = filesystem.info(location)
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def _filesystem(self, location: str) -> Any:
        """This process's fsspec filesystem for a URL; no request is made yet.

        Raises:
            DataError: the extra isn't installed, or another kind of URL.
        """
        key = (os.getpid(), urlsplit(location).scheme)
        if key not in self._filesystems:
            self._filesystems.setdefault(key, new_filesystem(location, self._options.timeout_s))
        return self._filesystems[key]

    def _run_for_block(self, location: str, identity: str, size: int, wanted: int) -> bytes:
        """Run a command once and cache every block that it gives; returns one of them."""
        command = pipe_command(location, self._options.allowed_commands)
        if not self._cache.holds(size):
            raise ConfigError(
                f"{location!r} gives all of its {size} bytes at once, more than data.remote.cache_bytes "
                f"({self._options.cache_bytes}) can hold",
                "raise data.remote.cache_bytes to several times the size of a shard",
            )

        def run() -> bytes:
            found, given, names = b"", 0, []
            try:
                with closing(pipe_output(command, self._options.timeout_s)) as chunks:
                    for number, data in enumerate(_cut(chunks, self._block_bytes)):
                        given += len(data)
                        if given > size:
                            raise EOFError(f"more than the {size} bytes of the manifest came")
                        names.append(block_name(identity, number))
                        self._cache.put(names[-1], data)
                        if number == wanted:
                            found = data
                if given != size:
                    raise EOFError(f"{given} bytes came, the manifest says {size}")
            except BaseException:
                for name in names:  # nobody knows what they are
                    self._cache.drop(name)
                raise
            return found

        return self._retried(location, run)

    def _retried(self, location: str, ask: Callable[[], T]) -> T:
        """What ``ask`` returns; called again after a wait as long as its error may pass.

        Raises:
            DataError: from the last error.
        """
        tries = 0
        while True:
            tries += 1
            try:
                return ask()
            except ScaleError:
                raise
            except Exception as error:
                if isinstance(error, (AssertionError, AttributeError, LookupError, NameError, TypeError)):
                    raise  # a bug
                if not may_pass(error) or tries > self._options.retries:
                    raise failure(location, error, tries) from error
                wait = min(_MAX_WAIT_S, self._first_wait_s * 2 ** (tries - 1))
                # Up to a quarter more, so that a thousand readers don't come back together. Not from the module's
                # generator, which forked workers share and which others may have seeded.
                wait *= 1 + random.SystemRandom().random() / 4
                log().warning(
                    "%s: %s; asked again in %.1f s (try %d of %d)",
                    without_secrets(location),
                    cause(error),
                    wait,
                    tries + 1,
                    self._options.retries + 1,
                )
                time.sleep(wait)


def _cut(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """The same bytes in blocks; only the last one may be shorter."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while len(pending) >= block_bytes:
            yield bytes(pending[:block_bytes])
            del pending[:block_bytes]
    if pending:
        yield bytes(pending)
