"""Writing checkpoints behind the training: snapshot -> files -> agreement of all ranks -> manifest -> rename.

    begin()     all ranks copy what DeepSpeed would save; training goes on from here
    (thread)    each rank writes its files, hashing what it writes, and flushes them to the disk
    advance()   all ranks are on disk: rank 0 gets every size and SHA-256
    (thread)    rank 0 writes the manifest, flushes, renames, flushes the folder, deletes what isn't kept
    advance()   rank 0 is done: published

Ranks learn at the step boundary, with the flags they exchange there anyway, that all threads are done; no thread ever
takes part in a collective.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.durable import sync_file, sync_folder
from swinv2_scale.engine import random_states, retention, zero
from swinv2_scale.engine.checkpoint import MANIFEST, STATE, Checkpoint, FileRecord, manifest_text, name_of
from swinv2_scale.engine.deepspeed_import import TorchCheckpointEngine
from swinv2_scale.engine.evaluate import Validation
from swinv2_scale.errors import OutputError
from swinv2_scale.telemetry.console import log

_CHUNK_BYTES = 2**24
_Write = Callable[[Any], object]  # writes into an open binary file


@dataclass
class _Save:
    """A checkpoint on its way: first every rank's ``future`` gives its files, then rank 0's that all is published."""

    step: int
    part: Path
    target: Path
    validation: Validation | None
    begun: float
    stalled_s: float
    future: Future[Any] | None
    is_described: bool = False


class Saver:
    """The checkpoints of one life of a run. All ranks call its methods together, ``is_busy`` apart.

    Args:
        folder: RUN/checkpoints.
        staging: a folder in it that this life alone writes to. It is gone when another life has taken over: what comes
            late from this one can't be published then (engine/run_dir.py).
    """

    def __init__(self, engine: Any, folder: Path, staging: Path, policy: CheckpointConfig) -> None:
        self._engine = engine
        self.folder = folder
        self._staging = staging
        self._policy = policy
        self._snapshots = _Snapshots()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._save: _Save | None = None
        self._whole: set[Path] = set()
        self._is_abandoned = False

    @property
    def is_pending(self) -> bool:
        """A checkpoint isn't published yet; the same on every rank."""
        return self._save is not None

    @property
    def is_busy(self) -> bool:
        """This rank's thread is at work."""
        return self._save is not None and self._save.future is not None and not self._save.future.done()

    def begin(
        self,
        step: int,
        state: dict[str, Any],
        validation: Validation | None = None,
        lists: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Take a snapshot and begin to write it; waits for the checkpoint before, so there is one snapshot at most.

        Args:
            state: what a resumed run has to know; JSON, for ``state.json``.
            validation: of this very step.
            lists: rank 0's: files of the run that a resumed one goes on writing, by name.

        Raises:
            OutputError: on every rank, if any rank couldn't write the one before.
        """
        self.finish()
        begun = time.perf_counter()
        name = name_of(step)
        part = self._staging / name
        self._snapshots.start(zero.swapped_files(self._engine))
        with _engine_saves_to(self._engine, self._snapshots):
            self._engine.save_checkpoint(str(self._staging), tag=name, save_latest=False)
        files: list[tuple[str, _Write]] = [(p.name, partial(torch.save, c)) for p, c in self._snapshots.taken]
        files.append((random_states.file_name(dist.rank()), partial(torch.save, random_states.current())))
        if dist.rank() == 0:
            texts = {STATE: json.dumps(state, indent=1).encode(), **lists}
            files += [(name, partial(_write_bytes, data=data)) for name, data in texts.items()]
        stalled = time.perf_counter() - begun
        future = self._executor.submit(self._write, part, files)
        self._save = _Save(step, part, self.folder / name, validation, begun, stalled, future)
        # What lies in swap files isn't copied but read from there, and the next update writes there.
        if not self._policy.asynchronous or self._snapshots.lying:
            self.finish()
            self._snapshots.start({})

    def advance(self) -> None:
        """Go on with a checkpoint whose threads are done on all ranks.

        Raises:
            OutputError: on every rank, if any rank couldn't write. Older checkpoints are untouched.
        """
        save = self._save
        assert save is not None
        try:
            result = dist.all_agree(
                lambda: save.future.result() if save.future else None, f"writing the checkpoint {save.target}"
            )
        except OutputError:
            self._save = None
            if dist.rank() == 0:
                shutil.rmtree(save.part, ignore_errors=True)
            raise
        if save.is_described:
            self._save = None
            log().info(
                "step %d: checkpoint %s, written in %.1f s, training waited %.2f s",
                save.step,
                save.target,
                time.perf_counter() - save.begun,
                save.stalled_s,
            )
            return
        records = [record for of_rank in dist.gather(result) for record in of_rank or ()]
        save.future = self._executor.submit(self._publish, save, records) if dist.rank() == 0 else None
        save.is_described = True

    def finish(self) -> None:
        """Wait until the checkpoint on its way is published.

        Raises:
            OutputError: on every rank, if any rank couldn't write.
        """
        while self._save is not None:
            self.advance()

    def close(self) -> None:
        """Give up what isn't published; by each rank for itself, at any time."""
        self._is_abandoned = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        # The hasher isn't shut down: a write on its way may still need it; its thread ends with the process.

    def _write(self, part: Path, files: list[tuple[str, _Write]]) -> list[FileRecord]:
        torch.serialization.set_crc32_options(False)  # manifests have SHA-256; a third of the time
        with self._fenced():
            part.mkdir(exist_ok=True)
            return [self._write_file(part / name, write) for name, write in files]

    @contextmanager
    def _fenced(self) -> Iterator[None]:
        """A later life of the run has deleted this one's staging folder, before a write or in the middle of it."""
        try:
            yield
        except FileNotFoundError as error:
            if self._staging.exists():
                raise
            raise OutputError(
                f"{self.folder.parent} was taken over by a later job: {self._staging.name} is gone",
                "let that job go on (RUN/lives.jsonl names it), or stop it and start this one again",
            ) from error

    def _write_file(self, path: Path, write: _Write) -> FileRecord:
        raw = _HashedFile(path, self._hasher, lambda: self._is_abandoned)
        try:
            with io.BufferedWriter(raw, 2**20) as file:
                write(file)
                sync_file(file)
        except RuntimeError as error:  # torch's zip writer reports a full disk as an unexpected position
            raise raw.failure or OSError(None, str(error), str(path)) from error
        return FileRecord(path.name, raw.num_bytes, raw.sha256.hexdigest())

    def _publish(self, save: _Save, records: list[FileRecord]) -> None:
        loss, score = (save.validation.loss, save.validation.score) if save.validation else (None, None)
        with self._fenced():
            text = manifest_text(save.step, dist.world_size(), records, loss, score)
            self._write_file(save.part / MANIFEST, partial(_write_bytes, data=text.encode()))
            sync_folder(save.part)
            if save.target.exists():  # a damaged one of this step, from a life before a fall-back
                save.target.rename(self._staging / f"old-{save.target.name}")
            save.part.rename(save.target)
            sync_folder(self.folder)
        shutil.rmtree(self._staging / f"old-{save.target.name}", ignore_errors=True)
        self._whole.add(save.target)  # hashed on its way to the disk; the ones before are read back now
        retention.prune(self.folder, save.step, self._policy, self._is_whole)
        self._whole.discard(save.target)

    def _is_whole(self, checkpoint: Checkpoint) -> bool:
        """Read back once in this life, when the next one was published: a disk that loses what it got is found out
        while older ones are still there.
        """
        if checkpoint.path not in self._whole and retention.is_whole(checkpoint):
            self._whole.add(checkpoint.path)
        return checkpoint.path in self._whole


def _write_bytes(file: Any, data: bytes) -> None:
    file.write(data)


class _HashedFile(io.FileIO):
    """Hashes what is written, and remembers why a write failed."""

    def __init__(self, path: Path, hasher: ThreadPoolExecutor, is_abandoned: Callable[[], bool]) -> None:
        super().__init__(path, "w")
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.failure: OSError | None = None
        self._hasher = hasher
        self._is_abandoned = is_abandoned

    def write(self, data: Any) -> int:
        if self._is_abandoned():
            raise OSError(None, "the job has ended")
        data = memoryview(data)[:_CHUNK_BYTES]  # BufferedWriter comes again with the rest
        hashing = self._hasher.submit(self.sha256.update, data)
        written = 0
        try:
            while written < len(data):
                written += super().write(data[written:])
        except OSError as error:
            self.failure = error
            raise
        finally:
            hashing.result()  # the caller may change the data from here on
        # The disk begins with this chunk now, not when all is to be flushed.
        os.posix_fadvise(self.fileno(), self.num_bytes, written, os.POSIX_FADV_DONTNEED)
        self.num_bytes += written
        return written


class _Snapshots(TorchCheckpointEngine):  # type: ignore[misc]
    """Where DeepSpeed would write files: copies of their contents in host memory, kept from one save to the next."""

    def __init__(self) -> None:
        self.name = "Snapshots"
        self.taken: list[tuple[Path, Any]] = []
        self.lying: dict[int, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._num_used = 0

    def start(self, lying: dict[int, Tensor]) -> None:
        """
        Args:
            lying: files that stand for tensors of these id()s, mapped.
        """
        self.taken, self._num_used, self.lying = [], 0, lying

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written yet."""

    def save(self, state_dict: Any, path: str) -> None:
        self.taken.append((Path(path), self._copy(state_dict)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in self.lying:
                return self.lying[id(value)]
            return self._copy_tensor(value.detach())
        if isinstance(value, dict):
            return type(value)((key, self._copy(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return value

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        number, self._num_used = self._num_used, self._num_used + 1
        buffer = self._buffers[number] if number < len(self._buffers) else None
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[number : number + 1] = [buffer]
        return buffer.copy_(tensor, non_blocking=True)


@contextmanager
def _engine_saves_to(engine: Any, snapshots: _Snapshots) -> Iterator[None]:
    usual, engine.checkpoint_engine = engine.checkpoint_engine, snapshots
    # DeepSpeed copies two scripts into every checkpoint, outside its writer.
    engine._copy_recovery_script = lambda save_path: None
    engine.zero_nvme_offload_optimizer = lambda: False  # and its swap files
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer
