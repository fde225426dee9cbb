"""Batches of one rank, starting at any step, from worker processes that keep no state."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swinv2_scale.data.manifest import ShardSet
from swinv2_scale.data.order import Order, positions_of
from swinv2_scale.data.reader import Record, ShardReader
from swinv2_scale.draws import Draw
from swinv2_scale.errors import DataError

Sample = dict[str, NDArray[Any]]
#: A task's part: from a record and its random numbers to named arrays of one shape for all samples.
MakeSample = Callable[[Record, Draw], Sample]


@dataclass
class Batch:
    """Samples of consecutive positions."""

    arrays: dict[str, Tensor]  # each (B, ...)
    digest: int  # of (position, sample id), to be summed over the batches of a step

    def pin_memory(self) -> Batch:
        return Batch({name: t.pin_memory() for name, t in self.arrays.items()}, self.digest)

    def to(self, device: torch.device) -> Batch:
        return Batch({name: t.to(device, non_blocking=True) for name, t in self.arrays.items()}, self.digest)


class PositionDataset(Dataset[Any]):
    """Sample by position. An error of ours is returned, not raised: torch would wrap it into a traceback."""

    def __init__(self, shards: ShardSet, order: Order, make_sample: MakeSample, fixed_epoch: str | None) -> None:
        self.reader = ShardReader(shards)
        self.order = order
        self.make_sample = make_sample
        self.fixed_epoch = fixed_epoch

    def __getitem__(self, position: int) -> tuple[Sample, int] | DataError:
        place = self.order.locate(position)
        try:
            record = self.reader.read(place.shard, place.sample)
            epoch = self.fixed_epoch if self.fixed_epoch is not None else place.epoch
            sample = self.make_sample(record, Draw(self.order.seed, epoch, record.id))
        except DataError as error:
            return error
        return sample, sample_digest(position, record.id)

    def __len__(self) -> int:
        return self.order.num_samples


def sample_digest(position: int, sample_id: str) -> int:
    """40 bits of a position and the sample read there; their sum over a batch is exact in int64 and order-aware."""
    text = f"{position} {sample_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=5).digest(), "little")


def training_batches(
    shards: ShardSet,
    order: Order,
    make_sample: MakeSample,
    *,
    start_step: int,
    end_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    prefetch_batches: int,
) -> Generator[Batch]:
    """Micro-batches of one rank from ``start_step`` up to ``end_step`` (steps counted from 0).

    Close the iterator when an error or a stop ends the training early: its workers ignore signals.

    Raises:
        DataError: when a sample can't be read, at the batch that needed it.
    """
    positions = _StepPositions(range(start_step, end_step), global_batch_size, micro_batch_size, rank, world_size)
    return _batches(PositionDataset(shards, order, make_sample, None), positions, num_workers, prefetch_batches)


def evaluation_batches(
    shards: ShardSet,
    order: Order,
    make_sample: MakeSample,
    *,
    num_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """The first ``num_samples`` positions dealt over the ranks, with the same random numbers every time.

    Every rank gets the same number of batches of one size; what is missing at the end is filled with repeats whose
    ``weight`` is 0, so that ranks stay in step and no sample counts twice.
    """
    stride = micro_batch_size * world_size
    rounds = -(-num_samples // stride)
    starts = [r * stride + rank * micro_batch_size for r in range(rounds)]
    wanted = [range(start, start + micro_batch_size) for start in starts]
    dataset = PositionDataset(shards, order, make_sample, "evaluation")
    for positions, batch in zip(
        wanted, _batches(dataset, [_wrapped(p, num_samples) for p in wanted], 0, 1), strict=True
    ):
        batch.arrays["weight"] = torch.tensor([float(position < num_samples) for position in positions])
        yield batch


@dataclass(frozen=True)
class _StepPositions:
    """The micro-batches of a rank, made one at a time: a long training has millions."""

    steps: range
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            yield from positions_of(step, self.global_batch_size, self.micro_batch_size, self.rank, self.world_size)


def _wrapped(positions: range, size: int) -> list[int]:
    return [position % size for position in positions]


def _batches(
    dataset: PositionDataset, positions: Iterable[Iterable[int]], num_workers: int, prefetch_batches: int
) -> Generator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=positions,  # type: ignore[arg-type]  # any iterable works; torch asks for a Sampler of lists
        num_workers=num_workers,
        prefetch_factor=prefetch_batches if num_workers else None,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: the loader draws a seed for its workers, which nobody uses.
        generator=torch.Generator(),
    )
    try:
        for item in loader:
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        dataset.reader.close()  # without workers it was used in this process


@atexit.register
def _end_workers() -> None:
    """Python ends daemons with the SIGTERM that ours ignore, and would wait for them for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _ignore_signals(_: int) -> None:
    """A stop signal reaches the whole process tree; the trainer still needs its workers to reach the step's end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[tuple[Sample, int] | DataError]) -> Batch | DataError:
    samples: list[tuple[Sample, int]] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        samples.append(item)
    names = samples[0][0]
    arrays = {name: torch.from_numpy(np.stack([sample[name] for sample, _ in samples])) for name in names}
    return Batch(arrays, sum(digest for _, digest in samples))
