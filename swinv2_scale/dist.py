"""The processes of one job. The only module that calls torch.distributed."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from swinv2_scale.errors import ClusterError, OutputError, PeerLostError, ScaleError
from swinv2_scale.launchers.place import adopt

T = TypeVar("T")
_MOST_FILES = 65_536
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def rank() -> int:
    """This process's number, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_s: int) -> None:
    """Join the other processes; without a launcher, be the only one.

    Raises:
        ClusterError: the launcher's environment is incomplete, or more processes than GPUs were started.
    """
    adopt()  # DeepSpeed reads the environment even where there is one process
    if torch.cuda.is_available():
        if local_world_size() > torch.cuda.device_count():
            raise ClusterError(
                f"{local_world_size()} processes on a node that shows {torch.cuda.device_count()} GPUs",
                "start one process per GPU, and let every process see all of them (CUDA_VISIBLE_DEVICES; in Slurm "
                "--gpus-per-node instead of --gpus-per-task)",
            )
        torch.cuda.set_device(local_rank())
        # Resuming to the same bits needs the same sums: no atomics in convolutions, no autotuned choice of kernels.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        backend = "nccl"
    else:
        # Two processes with all cores each would only take them from one another.
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(cores // local_world_size(), 1))
        keep_freed_memory()
        backend = "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        if world_size() > 1:
            device_id = device() if torch.cuda.is_available() else None
            store, *_ = next(rendezvous("env://", timeout=timeout))
            store = PrefixStore(_attempt(), store)
            torch_dist.init_process_group(
                backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=device_id
            )
        else:
            torch_dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise PeerLostError(
            f"rank {rank()} could not join the other {world_size() - 1} processes: {first_line}",
            f"another job of this host listens on port {os.environ['MASTER_PORT']}: choose another "
            "(deepspeed --master_port, torchrun --master-port, for srun MASTER_PORT)"
            if "EADDRINUSE" in first_line
            else "look for the first error of the other ranks; every node must reach "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        ) from error


def _attempt() -> str:
    """torchrun's agent keeps what an attempt's ranks wrote; without a prefix gloo connects to ranks that have died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def stop() -> None:
    """Leave the group; safe to call twice and after a peer was lost."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


@contextmanager
def peers_may_be_lost(doing: str, who: Callable[[], str]) -> Iterator[None]:
    """Turn the backends' errors about a dead or silent peer into PeerLostError.

    Args:
        who: finds out which one; asked when it has happened.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        signs = (
            "Connection closed by peer",
            "Connection reset by peer",
            "Timed out waiting",
            "timed out",
            "Broken pipe",
        )
        if not (isinstance(error, torch_dist.DistError) or any(sign in text for sign in signs)):
            raise
        first_line = text.strip().splitlines()[0][:300]
        raise PeerLostError(
            f"rank {rank()} lost another rank while {doing}: {who()} ({first_line})",
            "look for the first error of the other ranks (RUN/log/rank-N.log), then start the job again; it resumes",
        ) from error


class Board:
    """Short notes that every process of the job can write and read, on a connection of its own.

    The group's own connection is taken while a collective waits. Calls wait for as long as the process that keeps the
    notes (rank 0, or torchrun's agent) is stopped or cut off, whatever time-out was asked for (torch 2.15): make them
    in a thread that can be left behind. They raise RuntimeError when that process has ended.
    """

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, world_size(), is_master=False, wait_for_workers=False)
        self._store = PrefixStore(f"swinv2_scale/{_attempt()}", store)

    def write(self, name: str, note: str) -> None:
        self._store.set(name, note)
        # The store doesn't answer a write: somebody who was told of it by another way could read before it is there.
        self._store.check([name])

    def read(self, names: Sequence[str]) -> list[str] | None:
        """The notes with these names; None, without waiting, if one of them was never written."""
        keys = list(names)
        return [note.decode() for note in self._store.multi_get(keys)] if self._store.check(keys) else None


def barrier() -> None:
    torch_dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, in place, and returned."""
    torch_dist.all_reduce(values)
    return values


def broadcast(value: T | None) -> T:
    """Rank 0's value on every rank. The value is pickled by torch: only between our own processes."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    values: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value)
    return values


def ranks_unlike_zero(value: object) -> list[int]:
    """The ranks whose value isn't rank 0's; the same answer on every rank."""
    values = gather(value)
    return [rank for rank, theirs in enumerate(values) if theirs != values[0]]


def all_agree(action: Callable[[], T], doing: str) -> T:
    """Run something that can fail on one rank alone; every rank raises if any did.

    Without this the healthy ranks would wait for the failed one in their next collective.

    Raises:
        ScaleError: the first failing rank's own error, on every rank.
    """
    result: T | None = None
    failure: ScaleError | None = None
    bug: Exception | None = None
    try:
        result = action()
    except ScaleError as error:
        failure = error
    except OSError as error:
        failure = OutputError(f"rank {rank()} failed while {doing}: {error}", _advice(error))
    except Exception as error:  # a bug of ours: raised here as it is, and the other ranks must not wait for this one
        bug = error
        failure = PeerLostError(f"rank {rank()} failed while {doing}: {error!r}", "see its traceback")
    failures = [f for f in gather(failure) if f is not None]
    if bug is not None:
        raise bug
    if failures:
        failures[0].is_shared = True
        raise failures[0]
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T], doing: str) -> T:
    """Run on rank 0, give everybody its result, or its error."""
    result = all_agree(lambda: action() if rank() == 0 else None, doing)
    return broadcast(result)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then start the same command again"
    return "check permissions" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""


def all_gather_into(whole: Tensor, values: Tensor) -> Tensor:
    """Every rank's values in rank order, along the first axis of ``whole``, which is returned."""
    torch_dist.all_gather_into_tensor(whole, values)
    return whole


def keep_freed_memory() -> None:
    """Let malloc keep up to 2 GiB that was freed, for the next step, which needs as much again.

    glibc otherwise hands it back to the system and gets it zeroed, page by page, at every step: up to a seventh of a
    step on a CPU (benchmarks/results/allocator_*.md). Blocks over 32 MiB still go back, so that they don't leave holes.
    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def allow_open_files() -> None:
    """Let this process open as many files as it may, up to 65,536.

    Rank 0's store holds two connections of every rank; 1,024, the usual limit that may be raised, ends at 500 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
