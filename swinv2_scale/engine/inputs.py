"""What a job reads: its shards, checked, and the batches of this rank."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig, ShardPattern, patterns_of
from swinv2_scale.config.tasks import ClassificationConfig
from swinv2_scale.data.ledger import Quarantined
from swinv2_scale.data.loader import Batch, MakeSample, PositionDataset, Share, evaluation_batches, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.remote.files import RemoteFiles, is_remote
from swinv2_scale.data.remote.pipe import PIPE_PREFIX, pipe_command
from swinv2_scale.data.shards.labels import Labels, check_labels, read_class_names, read_labels
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import FileProblem, ShardSet, raise_file_problems, read_shard_set
from swinv2_scale.data.sources.embedded import EMBEDDED_PREFIX, embedded_shards
from swinv2_scale.errors import DataError
from swinv2_scale.tasks.base import Task
from swinv2_scale.telemetry.console import log


@dataclass(frozen=True)
class Inputs:
    """The data sets of a job; the same on every rank."""

    config: RunConfig
    remote: RemoteFiles
    train: ShardSet
    validation: ShardSet | None
    labels: tuple[str, ...] = ()  # names of classes, in the order of labels; empty where nobody knows

    @cached_property
    def order(self) -> Order:
        """Of the training samples."""
        data = self.config.data
        return Order.of(
            self.train.sizes,
            self.config.seed,
            data.shuffle,
            data.shuffle_shards,
            self.train.sources,
            data.train_weights,
        )

    def training(self, task: Task, position: int, num_steps: int) -> Generator[Batch]:
        """This rank's micro-batches of so many steps, the first of which begins at a position of the order.

        Args:
            position: a multiple of the global batch size; steps and positions come apart where samples are left out.
        """
        first, rest = divmod(position, self.config.data.global_batch_size)
        assert rest == 0
        dataset = self._dataset(self.train, self.order, task.training_sample)
        share = self._share(task, self.config.data.micro_batch_size, dist.rank(), dist.world_size())
        return training_batches(dataset, share, first, first + num_steps)

    def held_back(self, task: Task) -> Generator[Batch]:
        """This rank's share of the validation samples, the same ones every time; to be closed."""
        share = self._share(task, self.config.data.micro_batch_size, dist.rank(), dist.world_size())
        return self._evaluation(task, self.num_held_back, share)

    @property
    def num_held_back(self) -> int:
        """How many validation samples are used."""
        found = self.validation.num_samples if self.validation else 0
        return min(self.config.evaluation.samples or found, found)

    def panel_batch(self, task: Task) -> Batch:
        """The images of the panel, the same ones every time and on every rank."""
        assert self.validation is not None
        count = min(self.config.logging.panel_images, self.validation.num_samples)
        return next(self._evaluation(task, count, self._share(task, count, 0, 1)))

    def check_held_back(self, lost: list[Quarantined]) -> None:
        """
        Raises:
            DataError: more validation samples are damaged than the run allows.
        """
        share = self.config.data.max_quarantined_share
        if len(lost) > share * self.num_held_back:
            raise DataError(
                f"{len(lost)} of {self.num_held_back} validation samples are damaged, data.max_quarantined_share is "
                f"{share:.3%}; the first: {lost[0].cause}",
                "swinv2-scale shards verify lists all of them",
            ).shared()

    def _evaluation(self, task: Task, num_samples: int, share: Share) -> Generator[Batch]:
        assert self.validation is not None
        order = Order.of(self.validation.sizes, self.config.seed, shuffle=False, shuffle_shards=1)
        dataset = self._dataset(self.validation, order, task.evaluation_sample, "evaluation")
        return evaluation_batches(dataset, share, num_samples)

    def _dataset(
        self, shards: ShardSet, order: Order, make_sample: MakeSample, fixed_epoch: str | None = None
    ) -> PositionDataset:
        skip_damaged = self.config.data.max_quarantined_share > 0
        return PositionDataset(ShardReader(shards, self.remote), order, make_sample, skip_damaged, fixed_epoch)

    def _share(self, task: Task, micro_batch_size: int, rank: int, world_size: int) -> Share:
        data = self.config.data
        return Share(
            global_batch_size=data.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
            prefetch_bytes=data.prefetch_bytes,
            sample_bytes=task.sample_bytes,
        )


def open_inputs(config: RunConfig) -> Inputs:
    """Find, write (embedded ones) and check the shards; called by all ranks.

    Raises:
        DataError: on every rank: no shards, damaged ones, too few samples, or training samples held back.
        OutputError: embedded shards can't be written.
        ConfigError: the cache can't hold a block of each reader.
    """
    remote = _open_remote(config)
    train = _open_shard_set(config, remote, config.data.train, "training", config.data.train_weights is not None)
    if train.num_samples < config.data.global_batch_size:
        raise DataError(
            f"data.train has {train.num_samples} samples, fewer than data.global_batch_size "
            f"{config.data.global_batch_size}",
            "add shards or make the global batch smaller",
        )
    trained = _check_labels(config, remote, train, "data.train")
    labels = _names_of_classes(config, trained.names)
    if config.data.validation is None:
        return Inputs(config, remote, train, None, labels)
    validation = _open_validation(config, remote, config.data.validation)
    both = {entry.sha256 for entry in train.entries} & {entry.sha256 for entry in validation.entries}
    if both:
        name = next(name for name, entry in zip(train.locations, train.entries, strict=True) if entry.sha256 in both)
        raise DataError(f"{name} is in data.train and in data.validation", "hold some shards back")
    held_back = _check_labels(config, remote, validation, "data.validation")
    # Not by their names in words: ImageNet-1K has some, ImageNet-V2 doesn't.
    is_other = bool(held_back.classes and trained.classes and held_back.classes != trained.classes)
    if is_other and not _class_names_file(config):
        raise DataError(
            f"data.train and data.validation name different classes: {', '.join(trained.classes[:3])}, .. and "
            f"{', '.join(held_back.classes[:3])}, ..",
            "their labels would mean different things: write both from one list of classes, or name the classes "
            "yourself with task.class_names",
        )
    return Inputs(config, remote, train, validation, labels or held_back.names)


def _check_labels(config: RunConfig, remote: RemoteFiles, shards: ShardSet, use: str) -> Labels:
    """What is known of the classes in shards, if they are for a task that has classes."""
    if not isinstance(config.task, ClassificationConfig):
        return Labels((), None)

    def check() -> Labels:
        labels = read_labels(shards, remote)
        check_labels(labels, shards.num_samples, config.model.num_classes, use, config.data.max_quarantined_share)
        return labels

    return dist.on_rank_zero(check, f"looking at the labels of {use}")


def _class_names_file(config: RunConfig) -> str | None:
    return config.task.class_names if isinstance(config.task, ClassificationConfig) else None


def _names_of_classes(config: RunConfig, known: tuple[str, ...]) -> tuple[str, ...]:
    path = _class_names_file(config)
    if path is None:
        return known
    return dist.on_rank_zero(lambda: read_class_names(Path(path), config.model.num_classes), "reading the class names")


def open_held_back(config: RunConfig, pattern: ShardPattern) -> Inputs:
    """The validation samples alone, for an evaluation: they stand for the training's too, which nobody reads.

    Raises:
        DataError: on every rank: no shards, damaged ones, or other classes than the model's.
    """
    remote = _open_remote(config)
    validation = _open_validation(config, remote, pattern)
    labels = _names_of_classes(config, _check_labels(config, remote, validation, "data.validation").names)
    return Inputs(config, remote, validation, validation, labels)


def _open_remote(config: RunConfig) -> RemoteFiles:
    num_readers = dist.local_world_size() * (config.data.num_workers + 1)
    return dist.all_agree(
        lambda: RemoteFiles(config.data.remote, num_readers=num_readers), "looking at the cache's size"
    )


def _open_validation(config: RunConfig, remote: RemoteFiles, pattern: ShardPattern) -> ShardSet:
    validation = _open_shard_set(config, remote, pattern, "validation", is_mixture=False)
    if not validation.num_samples:
        raise DataError("data.validation has no samples", "name shards that have some, or leave the key out")
    return validation


def _open_shard_set(
    config: RunConfig, remote: RemoteFiles, pattern: ShardPattern, use: str, is_mixture: bool
) -> ShardSet:
    def read() -> ShardSet:
        patterns = [
            embedded_shards(part, Path(config.data.shards_dir)) if part.startswith(EMBEDDED_PREFIX) else part
            for part in patterns_of(pattern)
        ]
        for part in patterns:
            if part.startswith(PIPE_PREFIX):  # said now, not by the first sample
                pipe_command(part, config.data.remote.allowed_commands)
        if not is_mixture:
            return read_shard_set(patterns, remote, config.data.index_dir)
        sources = [read_shard_set(part, remote, config.data.index_dir) for part in patterns]
        for part, source in zip(patterns, sources, strict=True):
            if not source.num_samples:
                raise DataError(f"{part} has no samples", "leave it out of data.train and data.train_weights")
        return ShardSet.joined(sources)

    shards = dist.on_rank_zero(read, f"opening the {use} shards")
    _check_files(config, remote, shards, use)
    log().info(
        "%s data: %s samples in %d shards, %.1f MiB (%s)",
        use,
        f"{shards.num_samples:,}",
        len(shards.locations),
        shards.num_bytes / 2**20,
        shards.names[0].rpartition("/")[0] or ".",
    )
    _warn_about_cache(config, shards)
    return shards


def _check_files(config: RunConfig, remote: RemoteFiles, shards: ShardSet, use: str) -> None:
    """One process of each node looks for the files."""

    def look() -> list[FileProblem] | None:
        return shards.file_problems(remote) if dist.local_rank() == 0 else None

    found = dist.gather(dist.all_agree(look, f"checking the {use} shards"))
    nodes = [problems for problems in found if problems is not None]
    problems = max(nodes, key=len)
    missing = sum(shards.entries[shard].samples for shard in {p.shard for p in problems if p.is_missing})
    share = config.data.max_quarantined_share
    # What one node alone misses would make the substitutes depend on the number of nodes.
    if not share or missing > share * shards.num_samples or any(other != nodes[0] for other in nodes):
        raise_file_problems(problems)
    for problem in problems:
        log().warning("%s; its samples will be put into quarantine", problem.message)


def _warn_about_cache(config: RunConfig, shards: ShardSet) -> None:
    mixed = min(config.data.shuffle_shards, len(shards.entries)) if config.data.shuffle else 1
    read_at_once = sum(sorted((entry.bytes for entry in shards.entries), reverse=True)[:mixed])
    if any(map(is_remote, shards.locations)) and read_at_once > config.data.remote.cache_bytes:
        log().warning(
            "samples are mixed over %d shards, %.1f GiB, and data.remote.cache_bytes holds %.1f GiB: parts of shards "
            "will be fetched more than once; raise it, or lower data.shuffle_shards",
            mixed,
            read_at_once / 2**30,
            config.data.remote.cache_bytes / 2**30,
        )
