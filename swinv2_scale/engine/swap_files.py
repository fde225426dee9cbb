"""Where DeepSpeed swaps to: its optimizer states and parameters in files, read and written by a few threads.

DeepSpeed's own file operator (async_io) is C++: it takes minutes to compile on every node, a compiler and libaio's
headers. This one is what its swappers call of it, over plain reads and writes that go through the system's page cache;
PyTorch and Python leave the interpreter free meanwhile. Linux orders reads and writes of one file, mapped ones too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.run import OffloadConfig
from swinv2_scale.engine.deepspeed_import import swappers
from swinv2_scale.errors import OutputError

_THREADS = 4
#: A part of a read or write; Linux does at most 2 GiB at once.
_CHUNK_BYTES = 2**26


class SwapFiles:
    """DeepSpeed's ``aio_handle``; its tuning arguments mean nothing here."""

    #: Address of each buffer that DeepSpeed swaps through, and where it ends; of the whole process.
    _buffers: ClassVar[dict[int, int]] = {}

    def __init__(self, **tuning: Any) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="swap")
        self._pending: list[Future[None]] = []

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        self._pending.append(self._threads.submit(_move, os.preadv, buffer, path, offset, os.O_RDONLY))
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        self._pending.append(self._threads.submit(_move, os.pwritev, buffer, path, offset, os.O_WRONLY | os.O_CREAT))
        return 0

    def wait(self) -> int:
        """How many have ended since the last wait.

        Raises:
            OutputError: one couldn't read or write all of its bytes.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        return len(pending)

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        buffer = torch.empty(numel, dtype=example.dtype, pin_memory=torch.cuda.is_available())
        self._buffers[buffer.data_ptr()] = buffer.data_ptr() + buffer.nbytes
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> None:
        self._buffers.pop(buffer.data_ptr(), None)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of these buffers: DeepSpeed writes what doesn't through one of them."""
        address = tensor.data_ptr()
        return any(start <= address < end for start, end in self._buffers.items())


class _Builder:
    """DeepSpeed's AsyncIOBuilder: what it loads has the handle's class."""

    aio_handle = SwapFiles

    def load(self, verbose: bool = False) -> type[_Builder]:
        return _Builder


for _swapper in swappers:
    _swapper.AsyncIOBuilder = _Builder


def _move(call: Any, tensor: Tensor, path: str, offset: int, flags: int) -> None:
    data = memoryview(tensor.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            while done < len(data):
                moved = call(handle, [data[done : done + _CHUNK_BYTES]], offset + done)
                if not moved:
                    raise OSError(errno.EIO, f"it ends after {done} of {len(data)} bytes", path)
                done += moved
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(
            f"cannot swap with {path}: {error.strerror}",
            "make room in engine.offload.nvme_dir, or choose another folder; the same command goes on from the last "
            "checkpoint",
        ) from error


class SwapFolder:
    """This rank's part of ``engine.offload.nvme_dir``: no other job's, and empty.

    What a killed job left there is deleted by the next one of this rank, and what this one leaves by remove().
    """

    def __init__(self, config: OffloadConfig) -> None:
        """
        Raises:
            OutputError: it can't be written, or another job uses it.
        """
        assert config.nvme_dir is not None
        root = Path(config.nvme_dir)
        rank = f"rank{dist.rank()}"
        self._folders = [
            root / "zero_stage_3" / kind / rank for kind in ("optimizer", "float32params", "bfloat16params")
        ]
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / f"{rank}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise
            self._clear()
        except BlockingIOError as error:
            found = f"another job swaps to engine.offload.nvme_dir {root}"
            raise OutputError(found, "give each job a folder of its own") from error
        except OSError as error:
            found = f"cannot use engine.offload.nvme_dir {root}: {error.strerror}"
            raise OutputError(found, "choose a folder that can be written on every node") from error

    def remove_with(self, engine: Any) -> None:
        """Delete the files when an engine is gone, or this process ends."""
        weakref.finalize(engine, self._remove)

    def _remove(self) -> None:
        self._clear()
        os.close(self._lock)

    def _clear(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
