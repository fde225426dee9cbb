"""A shard of random bytes in a store of this machine, and readers whose blocks are small."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.remote.files import RemoteFiles
from tests.support.http_store import Fault, HttpStore, http_store

BLOCK = 10_000
SIZE = 34_567  # four blocks, the last one short
CONTENT = random.Random(3).randbytes(SIZE)
IDENTITY = hashlib.sha256(CONTENT).hexdigest()
#: Where a server is silent on purpose; nothing else may take so long on a busy machine.
SILENCE_S = 0.3
#: Faults that a later try may not meet.
PASSING = {
    "status 500": Fault(status=500),
    "status 502": Fault(status=502),
    "status 503": Fault(status=503),
    "status 429": Fault(status=429),
    "status 408": Fault(status=408),
    "silent before the answer": Fault(silent_after=-1),
    "silent in the body": Fault(silent_after=4_000),
    "cut before the body": Fault(cut_after=0),
    "cut in the body": Fault(cut_after=9_999),
    "another range": Fault(shift=100),
    "a body longer than it says": Fault(length=-1),
}


def patience(fault: Fault) -> float:
    """timeout_s for a test with this fault."""
    return 20 if fault.silent_after is None else SILENCE_S


@contextmanager
def served_shard(tmp_path: Path) -> Iterator[HttpStore]:
    """A server with ``s.tar`` and a file that is empty."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "s.tar").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    with http_store(folder) as running:
        yield running


def files(tmp_path: Path, **options: Any) -> RemoteFiles:
    """A reader that doesn't wait long before it asks again."""
    values: dict[str, Any] = {
        "cache_dir": str(tmp_path / "cache"),
        "cache_bytes": 2**20,
        "timeout_s": 20,
        "retries": 2,
    } | options
    return RemoteFiles(RemoteConfig(**values), block_bytes=BLOCK, first_wait_s=0.01)


def read_all(remote: RemoteFiles, location: str) -> bytes:
    return remote.read(location, IDENTITY, SIZE, 0, SIZE)


def in_child(work: Callable[[], None]) -> ForkProcess:
    """A forked process that ends with 0 if the work raises nothing."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process
