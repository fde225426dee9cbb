"""The disk that the run directory is on: space for checkpoints, and whether all nodes see the same one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine.doctor.compiled import compile_locks
from swinv2_scale.engine.doctor.findings import Finding, answer, of_error, problem, size, warning, worst
from swinv2_scale.errors import OutputError
from swinv2_scale.plan import zero
from swinv2_scale.telemetry.console import log

#: Saved at once: the newest stays until the next one is published.
_CHECKPOINTS = 2
#: A file of another node may be unknown here for so long: what network disks keep of a folder's names.
_VISIBLE_S = 10.0
_ANSWER_S = 12.0
_KEEP_SIZE = 1
#: Each process of a save writes a handful of files.
_INODES = 10_000
FREE, SWAP, SHARED = "disk for checkpoints", "disk for offloading", "run directory"


def checkpoint_bytes(config: RunConfig) -> int:
    """What one checkpoint of this job takes."""
    return zero.checkpoint_bytes(zero.Sharding.of(config, dist.world_size()))[0]


def check_before_training(config: RunConfig, checkpoints: Path) -> None:
    """What costs nothing at a start and would end the job hours later; by rank 0.

    Raises:
        OutputError: there is no room for one checkpoint.
    """
    free, needed = shutil.disk_usage(checkpoints).free, checkpoint_bytes(config)
    if free < needed:
        raise OutputError(
            f"{checkpoints} has {size(free)} free, one checkpoint takes {size(needed)}",
            "free some space, or choose another --run-dir",
        )
    if free < _CHECKPOINTS * needed:
        log().warning("%s has %s free, two checkpoints take %s", checkpoints, size(free), size(2 * needed))
    for lock in compile_locks():
        log().warning("%s; %s", lock.text, lock.advice)


def check_swap_space(config: RunConfig) -> str:
    """Whether what this node's processes offload fits ``engine.offload.nvme_dir``; by every rank, before training.

    Returns:
        What there is, and what it takes.

    Raises:
        OutputError: it doesn't fit.
    """
    if not config.engine.offload.uses_nvme:
        return "nothing is offloaded to files"
    folder = Path(str(config.engine.offload.nvme_dir)).absolute()
    free = shutil.disk_usage(_existing(folder)).free
    needed = zero.states(zero.Sharding.of(config, dist.world_size())).disk * dist.local_world_size()
    text = (
        f"engine.offload.nvme_dir {folder} has {size(free)} free, what a node's processes offload takes {size(needed)}"
    )
    if free < needed:
        raise OutputError(text, "free some space, name a folder on a larger disk, or use more nodes")
    return text


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def look_at_disk(config: RunConfig | None, run_dir: Path) -> list[Finding]:
    """Free space where the run directory is or will be, with what quotas leave of it; by one process alone."""
    folder = _existing(run_dir / "checkpoints")
    free, inodes = shutil.disk_usage(folder).free, os.statvfs(folder).f_favail
    needed = _CHECKPOINTS * checkpoint_bytes(config) if config else 0
    text = f"{size(free)} free on {_mount_point(folder)}" + (f", two take {size(needed)}" if needed else "")
    if not os.access(folder, os.W_OK):
        return [problem(FREE, f"{folder} can't be written", "choose another --run-dir")]
    if free < needed:
        return [problem(FREE, text, "free some space, or choose another --run-dir")]
    if inodes and inodes < _INODES:  # 0: a file system that doesn't count them
        return [warning(FREE, f"{text}; {inodes} more files (inodes)", "delete files, or choose another --run-dir")]
    if not needed:
        return [Finding(FREE, text, amount=free)]
    try:
        is_reserved = _reserve(folder, needed)
    except OSError as error:
        advice = "free some of your space (quota -s, lfs quota), or choose another --run-dir"
        return [problem(FREE, f"{text}, but they can't be reserved: {error.strerror}", advice)]
    quota = "reserved and released, so no quota is in the way" if is_reserved else "a quota can't be tested here"
    return [Finding(FREE, f"{text}; {quota}", amount=free)]


def _reserve(folder: Path, num_bytes: int) -> bool:
    """Take space and give it back, which is the one way to learn of a quota without its own tools.

    Returns:
        False: this file system can't reserve; nothing is known.

    Raises:
        OSError: EDQUOT, ENOSPC, EFBIG: one may not have so much.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # posix_fallocate would write where the file system can't reserve
    path = folder / f".doctor-{secrets.token_hex(6)}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        code = libc.fallocate(handle, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(num_bytes))
        reason = ctypes.get_errno() if code else 0
    finally:
        os.close(handle)
        path.unlink()
    if reason in (errno.EDQUOT, errno.ENOSPC, errno.EFBIG):
        raise OSError(reason, os.strerror(reason))
    return not code


def look_at_shared_folder(run_dir: Path) -> Finding:
    """Whether every node sees the same run directory, and one node's locks; called by all ranks.

    Rank 0 makes a file there, and leaves nothing behind.
    """
    lay = _Token(run_dir)
    failure = ""
    try:
        answer(lay.make, _ANSWER_S) if dist.rank() == 0 else None
    except OSError as error:  # a TimeoutError too
        failure = f"rank 0 can't write {run_dir}: {error}"
    name, failure = dist.broadcast((lay.name, failure))
    try:
        if failure:
            return problem(SHARED, failure, "choose another --run-dir")
        if dist.world_size() == 1:
            return Finding(SHARED, f"{run_dir} can be written and locked")
        # One of each node, and rank 1, so that there is one.
        is_looking = dist.rank() and (dist.local_rank() == 0 or dist.rank() == 1)
        return worst([found for found in dist.gather(_find_token(run_dir / name) if is_looking else None) if found])
    finally:
        lay.remove()


class _Token:
    """Rank 0's file, locked, in a run directory that perhaps had to be made."""

    def __init__(self, run_dir: Path) -> None:
        self.name = f".doctor-{secrets.token_hex(6)}"
        self._path = run_dir / self.name
        self._made: list[Path] = []
        self._handle: int | None = None

    def make(self) -> None:
        folder = self._path.parent
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(self._handle, self.name.encode())
        os.fsync(self._handle)
        fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):  # a job has begun in it
            for folder in self._made:
                folder.rmdir()


def _find_token(path: Path) -> Finding:
    """What one rank sees of rank 0's file."""
    where = f"rank {dist.rank()} on {os.uname().nodename}"
    try:
        is_locked = answer(lambda: _read_token(path), _ANSWER_S)
    except FileNotFoundError:
        advice = "all nodes must see the same run directory: put it on a shared disk"
        return problem(SHARED, f"{where} doesn't see what rank 0 writes to {path.parent}", advice)
    except OSError as error:
        return of_error(SHARED, error)
    if not is_locked:
        advice = "never start two jobs in one run directory: the later one would take it over"
        return warning(SHARED, f"{where} doesn't see the locks of rank 0 in {path.parent}", advice)
    return Finding(SHARED, f"{path.parent}: every node sees its files and locks")


def _read_token(path: Path) -> bool:
    """Whether rank 0's lock is seen; waits for the file."""
    end = time.monotonic() + _VISIBLE_S
    while True:
        try:
            os.listdir(path.parent)  # asks a network disk's server anew
            with path.open("r+b") as file:
                if file.read() != path.name.encode():
                    raise FileNotFoundError(errno.ENOENT, "another file of this name", str(path))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    return error.errno in (errno.EAGAIN, errno.EACCES)
                return False
        except FileNotFoundError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _mount_point(folder: Path) -> Path:
    folder = folder.resolve()
    while not folder.is_mount():
        folder = folder.parent
    return folder
