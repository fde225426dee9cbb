"""What manifests say about the labels of shards, and whether a classifier can learn from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swinv2_scale.data.images.decode import decode_class
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.manifest import read_manifest, split_location
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.data.shards.shard_set import ShardSet
from swinv2_scale.errors import ConfigError, DataError, SampleError

#: Files of a sample that labels are read from, in the order in which they count.
LABEL_EXTENSIONS = ("cls", "json")
_INDEX_ANEW = "make a new one: swinv2-scale shards index"


@dataclass(frozen=True)
class LabelCount:
    """The labels of some samples.

    Attributes:
        samples: that have one whole number as their label.
        smallest, largest: of them; 0 and -1 where there is none.
        others: samples with a label file that holds something else: several labels, a word, nothing.
    """

    samples: int = 0
    smallest: int = 0
    largest: int = -1
    others: int = 0

    def __post_init__(self) -> None:
        if any(type(value) is not int for value in asdict(self).values()):
            raise ValueError("labels are counted in whole numbers")

    def __add__(self, other: LabelCount) -> LabelCount:
        counted = [count for count in (self, other) if count.samples]
        return LabelCount(
            self.samples + other.samples,
            min((count.smallest for count in counted), default=0),
            max((count.largest for count in counted), default=-1),
            self.others + other.others,
        )

    def as_schema(self) -> dict[str, Any]:
        """For a manifest: nothing where there are no labels."""
        return {"labels": asdict(self)} if self.samples or self.others else {}

    def with_sample(self, files: Mapping[str, bytes]) -> LabelCount:
        """And one more, of which these label files are known."""
        if not files:
            return self
        try:
            label = decode_class(Record("", "", dict(files)), None)
        except SampleError:
            return self + LabelCount(others=1)
        return self + LabelCount(1, label, label)


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        names: of classes, in the order of labels and in words where there are some; empty where no manifest names them.
        counted: None where a manifest doesn't say: it was made by an earlier version, or for a part of its folder.
        classes: as the data set itself calls them, to be compared with another's.
    """

    names: tuple[str, ...]
    counted: LabelCount | None
    classes: tuple[str, ...] = field(default=(), compare=False)


def read_labels(shards: ShardSet, remote: RemoteFiles) -> Labels:
    """What the manifests of all folders of a data set say.

    Raises:
        DataError: a manifest is damaged, or folders name different classes.
    """
    folders = dict.fromkeys(split_location(location)[0] for location in shards.index_locations)
    schemas = [read_manifest(folder, remote).schema for folder in folders]
    names = {_names(schema) for schema in schemas}
    if len({classes for classes, _ in names if classes}) > 1:
        raise DataError(
            f"the manifests of {', '.join(folders)} name different classes",
            "labels would mean different things: write the shards again from one list of classes",
        )
    counts = [_count_of(schema, folder) for schema, folder in zip(schemas, folders, strict=True)]
    known = [count for count in counts if count is not None]
    classes, words = max(names, default=((), ()))
    return Labels(words or classes, total(known) if len(known) == len(counts) else None, classes)


def check_labels(labels: Labels, num_samples: int, num_classes: int, use: str, share: float = 0.0) -> None:
    """
    Args:
        use: ``data.train`` or ``data.validation``.
        share: of the samples that may be put into quarantine, for their label or anything else.

    Raises:
        DataError: the data set has other classes than the model, or samples without exactly one of them.
    """
    if labels.names and len(labels.names) != num_classes:
        raise DataError(
            f"{use} has {len(labels.names)} classes ({', '.join(labels.names[:3])}, ..), model.num_classes is "
            f"{num_classes}",
            f"set model.num_classes to {len(labels.names)}, or name shards of {num_classes} classes",
        )
    counted = labels.counted
    if counted is None:
        return  # each sample is checked when it is read
    if counted.others > share * num_samples:
        raise DataError(
            f"{use} has {counted.others:,} samples whose label isn't one whole number from 0 on",
            "classification takes one label an image (.cls, or label in .json); write the shards again with one each",
        )
    if num_samples - counted.samples > share * num_samples:
        raise DataError(
            f"{num_samples - counted.samples:,} of {num_samples:,} samples of {use} have no label",
            "labels are .cls files, or label in .json; write the shards again from folders or a table with labels",
        )
    if counted.largest >= num_classes and not share:  # how many there are isn't known
        raise DataError(
            f"{use} has labels {counted.smallest} to {counted.largest}, model.num_classes is {num_classes}: its "
            f"classes are 0 to {num_classes - 1}",
            f"set model.num_classes to {counted.largest + 1}, or write the shards again",
        )


def read_class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """A text file of class names, one a line in the order of labels.

    Raises:
        ConfigError: it can't be read, or has another number of names.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the class names {path}: {error}", "one name a line, as UTF-8") from None
    if len(names) != num_classes:
        raise ConfigError(f"{path} has {len(names)} names, the model has {num_classes} classes")
    return names


def _names(schema: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(as the data set names classes, as people do)."""
    return tuple(map(str, schema.get("classes", ()))), tuple(map(str, schema.get("class_names", ())))


def _count_of(schema: Mapping[str, Any], folder: str) -> LabelCount | None:
    if "labels" not in schema:
        members = schema.get("members")
        return None if members is None or set(LABEL_EXTENSIONS) & set(members) else LabelCount()
    try:
        return LabelCount(**schema["labels"])
    except (TypeError, ValueError) as error:
        raise DataError(f"the manifest of {folder} doesn't count labels as we do: {error}", _INDEX_ANEW) from None


def total(counts: Iterable[LabelCount]) -> LabelCount:
    return sum(counts, LabelCount())
