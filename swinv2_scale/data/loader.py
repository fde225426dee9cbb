"""Batches of one rank, starting at any step, from worker processes that keep no state."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swinv2_scale.data.forks import Context
from swinv2_scale.data.ledger import NUM_COLUMNS, Quarantined, tally
from swinv2_scale.data.order import Order, Place, positions_of
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.draws import Draw
from swinv2_scale.errors import ConfigError, DataError, SampleError, ScaleError
from swinv2_scale.telemetry.console import log

Sample = dict[str, NDArray[Any]]
#: A task's part: from a record and its random numbers to named arrays of one shape for all samples.
MakeSample = Callable[[Record, Draw], Sample]
#: So many substitutes in a row may be damaged too.
_MOST_SUBSTITUTES = 32


@dataclass
class Batch:
    """Samples of consecutive positions.

    Attributes:
        arrays: each (B, ...).
        digest: of (position, sample id), to be summed over the batches of a step.
        tally: int64 (epochs of the step, 4), see ledger.py; to be summed likewise.
        quarantined: samples that others stand in for.
        keys: the ids of the samples (Record.id), those that stand in included.
    """

    arrays: dict[str, Tensor]
    digest: int
    tally: Tensor = field(default_factory=lambda: torch.zeros((0, NUM_COLUMNS), dtype=torch.int64))
    quarantined: tuple[Quarantined, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.arrays.values())

    def pin_memory(self) -> Batch:
        return self._moved(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        arrays = {name: move(tensor) for name, tensor in self.arrays.items()}
        return replace(self, arrays=arrays)


@dataclass(frozen=True)
class Item:
    """What a position gave."""

    position: int
    place: Place
    sample: Sample
    digest: int
    quarantined: Quarantined | None
    key: str


@dataclass
class PositionDataset(Dataset[Any]):
    """Item by position. An error of ours is returned, not raised: torch would wrap it into a traceback."""

    reader: ShardReader
    order: Order
    make_sample: MakeSample
    skip_damaged: bool
    fixed_epoch: str | None = None

    def __getitem__(self, position: int) -> Item | ScaleError:
        place = self.order.locate(position)
        lost: Quarantined | None = None
        for attempt in range(_MOST_SUBSTITUTES):
            tried = self.order.substitute(position, attempt - 1) if attempt else place
            epoch = self.fixed_epoch if self.fixed_epoch is not None else place.epoch
            key = ""
            try:
                record = self.reader.read(tried.shard, tried.sample)
                key = record.key
                # As a substitute a sample has other random numbers than as itself.
                use = f" for {position}" if attempt else ""
                sample = self.make_sample(record, Draw(self.order.seed, epoch, record.id + use, position))
                return Item(position, place, sample, sample_digest(position, record.id), lost, record.id)
            except SampleError as error:
                if not self.skip_damaged:
                    return _with_leave(error)
                last, location = error, self.reader.shards.names[tried.shard]
                lost = lost or Quarantined(location, tried.sample, key, error.message, position, epoch)
            except ScaleError as error:  # the store doesn't answer, the cache's disk is full, a command isn't allowed
                return error
        return DataError(f"{_MOST_SUBSTITUTES} samples in a row are damaged, the last one: {last.message}")


def _with_leave(error: SampleError) -> SampleError:
    leave = "let the run replace and list such samples: data.max_quarantined_share=0.001"
    return SampleError(error.message, f"{error.next_step}; or {leave}" if error.next_step else leave)


def sample_digest(position: int, sample_id: str) -> int:
    """40 bits of a position and the sample read there; their sum over a batch is exact in int64 and order-aware."""
    text = f"{position} {sample_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=5).digest(), "little")


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process reads, and how.

    Args:
        sample_bytes: of one sample's arrays.
        prefetch_bytes: what batches may take while they wait.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    num_workers: int
    prefetch_batches: int
    prefetch_bytes: int
    sample_bytes: int

    def within_memory(self) -> tuple[int, int]:
        """(workers, batches that each may prepare) so that they fit into ``prefetch_bytes``, beside the batches of a
        step, which the trainer holds together.

        Raises:
            ConfigError: not even one does.
        """
        batch_bytes = self.micro_batch_size * self.sample_bytes
        held = self.global_batch_size // (self.micro_batch_size * self.world_size)
        fitting = self.prefetch_bytes // batch_bytes - held
        if fitting < min(self.num_workers, 1):
            raise ConfigError(
                f"data.prefetch_bytes is {self.prefetch_bytes:,}; the {held} batches of {self.micro_batch_size} "
                f"samples that make a step, and one more, take {(held + 1) * batch_bytes:,}",
                "raise data.prefetch_bytes, or lower data.global_batch_size",
            )
        workers, prefetch = self._dealt(fitting)
        if workers < self.num_workers:
            log().warning("data.prefetch_bytes lets %d of %d loader workers run", workers, self.num_workers)
        return workers, prefetch

    def beside_training(self, num_batches: int) -> tuple[int, int]:
        """The same for an evaluation of so many batches, while those of the training wait on; no workers where there
        is no room for one."""
        fitting = self.prefetch_bytes // (self.micro_batch_size * self.sample_bytes)
        held = self.global_batch_size // (self.micro_batch_size * self.world_size)
        workers, prefetch = self._dealt(fitting - held)
        # Nothing of a step is held meanwhile, but one batch of the evaluation; for a single one nobody need be started.
        return self._dealt(min(fitting - workers * prefetch - 1, num_batches)) if num_batches > 1 else (0, 0)

    def _dealt(self, fitting: int) -> tuple[int, int]:
        workers = max(min(self.num_workers, fitting), 0)
        return workers, min(self.prefetch_batches, fitting // workers) if workers else 0


def training_batches(dataset: PositionDataset, share: Share, start_step: int, end_step: int) -> Generator[Batch]:
    """Micro-batches of one rank from ``start_step`` up to ``end_step`` (steps counted from 0).

    Close the iterator when an error or a stop ends the training early: its workers ignore signals.

    Raises:
        ScaleError: when a sample can't be read, at the batch that needed it: DataError, of a cache OutputError, ...
        ConfigError: a batch doesn't fit into the memory that is allowed.
    """
    positions = _StepPositions(range(start_step, end_step), share)
    collate = _Collate(dataset.order, share)
    workers, prefetch = share.within_memory()
    return _batches(dataset, positions, collate, workers, prefetch)


def evaluation_batches(dataset: PositionDataset, share: Share, num_samples: int) -> Generator[Batch]:
    """The first ``num_samples`` positions dealt over the ranks, with the same random numbers every time.

    Every rank gets the same number of batches of one size; what is missing at the end is filled with repeats whose
    ``weight`` is 0, so that ranks stay in step and no sample counts twice. Samples in quarantine have weight 0 too.
    Close the iterator when an error ends the evaluation early: its workers ignore signals.

    Raises:
        ScaleError: when a sample can't be read, at the batch that needed it.
    """
    stride = share.micro_batch_size * share.world_size
    rounds = -(-num_samples // stride)
    starts = [r * stride + share.rank * share.micro_batch_size for r in range(rounds)]
    wanted = [range(start, start + share.micro_batch_size) for start in starts]
    wrapped = [[position % num_samples for position in positions] for positions in wanted]
    collate = _Collate(dataset.order, None)
    with closing(_batches(dataset, wrapped, collate, *share.beside_training(rounds))) as batches:
        for positions, batch in zip(wanted, batches, strict=True):
            lost = {damaged.position for damaged in batch.quarantined}
            # Repeats at the end don't count again.
            batch.quarantined = tuple({q.position: q for q in batch.quarantined if q.position in positions}.values())
            counts = [position < num_samples and position not in lost for position in positions]
            batch.arrays["weight"] = torch.tensor(counts, dtype=torch.float32)
            yield batch


@dataclass(frozen=True)
class _StepPositions:
    """The micro-batches of a rank, made one at a time: a long training has millions."""

    steps: range
    share: Share

    def __iter__(self) -> Iterator[range]:
        share = self.share
        for step in self.steps:
            yield from positions_of(step, share.global_batch_size, share.micro_batch_size, share.rank, share.world_size)


def _batches(
    dataset: PositionDataset,
    positions: Iterable[Iterable[int]],
    collate: _Collate,
    num_workers: int,
    prefetch_batches: int,
) -> Generator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=positions,  # type: ignore[arg-type]  # any iterable works; torch asks for a Sampler of lists
        num_workers=num_workers,
        prefetch_factor=prefetch_batches if num_workers else None,
        collate_fn=collate,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: the loader draws a seed for its workers, which nobody uses.
        generator=torch.Generator(),
        multiprocessing_context=Context() if num_workers else None,
    )
    try:
        for item in loader:
            if isinstance(item, ScaleError):
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


@dataclass(frozen=True)
class _Collate:
    """Items to a batch.

    Args:
        share: of a training, whose batches carry a tally.
    """

    order: Order
    share: Share | None

    def __call__(self, items: list[Item | ScaleError]) -> Batch | ScaleError:
        good: list[Item] = []
        for item in items:
            if isinstance(item, ScaleError):
                return item
            good.append(item)
        samples = [item.sample for item in good]
        batch = Batch(
            arrays={name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]},
            digest=sum(item.digest for item in good),
            quarantined=tuple(item.quarantined for item in good if item.quarantined),
            keys=tuple(item.key for item in good),
        )
        if self.share:
            assert batch.num_bytes <= len(good) * self.share.sample_bytes, "a task's sample_bytes is too small"
            first = good[0].position // self.share.global_batch_size * self.share.global_batch_size
            epochs = self.order.epochs(first, first + self.share.global_batch_size)
            places = ((item.place, item.quarantined is not None) for item in good)
            batch.tally = torch.from_numpy(tally(places, epochs))
        return batch
