"""What a job reads: its shards, checked, and the batches of this rank."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch, evaluation_batches, training_batches
from swinv2_scale.data.manifest import ShardSet, read_shard_set
from swinv2_scale.data.order import Order
from swinv2_scale.data.sources import EMBEDDED_PREFIX, embedded_shards
from swinv2_scale.errors import DataError
from swinv2_scale.tasks.base import Task
from swinv2_scale.telemetry.console import log


@dataclass(frozen=True)
class Inputs:
    """The data sets of a job; the same on every rank."""

    config: RunConfig
    train: ShardSet
    validation: ShardSet | None

    def training(self, task: Task, start_step: int, end_step: int) -> Generator[Batch]:
        """This rank's micro-batches of the steps from ``start_step`` (counted from 0) up to ``end_step``."""
        data = self.config.data
        return training_batches(
            self.train,
            Order(self.train.sizes, self.config.seed, data.shuffle, data.shuffle_shards),
            task.training_sample,
            start_step=start_step,
            end_step=end_step,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            rank=dist.rank(),
            world_size=dist.world_size(),
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
        )

    def held_back(self, task: Task) -> Iterator[Batch]:
        """This rank's share of the validation samples, the same ones every time."""
        return self._evaluation(
            task, self.config.evaluation.samples, self.config.data.micro_batch_size, dist.rank(), dist.world_size()
        )

    def panel_batch(self, task: Task) -> Batch:
        """The images of the panel, the same ones every time and on every rank."""
        assert self.validation is not None
        count = min(self.config.logging.panel_images, self.validation.num_samples)
        return next(self._evaluation(task, count, count, 0, 1))

    def _evaluation(
        self, task: Task, num_samples: int, micro_batch_size: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        assert self.validation is not None
        return evaluation_batches(
            self.validation,
            Order(self.validation.sizes, self.config.seed, shuffle=False, shuffle_shards=1),
            task.evaluation_sample,
            num_samples=min(num_samples, self.validation.num_samples),
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )


def open_inputs(config: RunConfig) -> Inputs:
    """Find, write (embedded ones) and check the shards; called by all ranks.

    Raises:
        DataError: on every rank: no shards, damaged ones, too few samples, or training samples held back.
        OutputError: embedded shards can't be written.
    """
    train = _open_shard_set(config, config.data.train, "training")
    if train.num_samples < config.data.global_batch_size:
        raise DataError(
            f"data.train has {train.num_samples} samples, fewer than data.global_batch_size "
            f"{config.data.global_batch_size}",
            "add shards or make the global batch smaller",
        )
    if config.data.validation is None:
        return Inputs(config, train, None)
    validation = _open_shard_set(config, config.data.validation, "validation")
    both = {entry.sha256 for entry in train.entries} & {entry.sha256 for entry in validation.entries}
    if both:
        name = next(path for path, entry in zip(train.paths, train.entries, strict=True) if entry.sha256 in both)
        raise DataError(f"{name} is in data.train and in data.validation", "hold some shards back")
    return Inputs(config, train, validation)


def _open_shard_set(config: RunConfig, pattern: str | tuple[str, ...], use: str) -> ShardSet:
    if isinstance(pattern, str) and pattern.startswith(EMBEDDED_PREFIX):
        name = pattern
        pattern = dist.on_rank_zero(lambda: embedded_shards(name, Path(config.data.shards_dir)), f"writing {name}")
    wanted = pattern
    # Rank 0 reads the manifests, one rank of each node looks for the files.
    shards = dist.on_rank_zero(lambda: read_shard_set(wanted), f"opening the {use} shards")
    dist.all_agree(lambda: shards.check_files() if dist.local_rank() == 0 else None, f"checking the {use} shards")
    log().info(
        "%s data: %s samples in %d shards, %.1f MiB (%s)",
        use,
        f"{shards.num_samples:,}",
        len(shards.paths),
        shards.num_bytes / 2**20,
        shards.paths[0].parent,
    )
    return shards
