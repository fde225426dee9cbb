"""What a shard set holds, in numbers: ``swinv2-scale shards stats``."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from swinv2_scale.data.images.arrays import read_npy
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, decode_class
from swinv2_scale.data.images.orientation import orientation_of, upright_size
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.manifest import read_manifest, split_location
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.errors import SampleError

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_NUM_BINS = 10
_MAX_PIXELS = PixelFormat(channels=3).max_pixels
_PROGRESS_EVERY = 100


@dataclass(frozen=True)
class Stats:
    """
    Attributes:
        samples, shards, bytes: of all, from the manifests.
        looked_at: samples that were read; everything below is counted over these.
        unreadable: of them, damaged ones.
        members: extension -> samples that have it.
        formats, modes: of the images, as Pillow names them.
        quantiles: width, height, shape and bytes of an image: least, 5 %, 25 %, median, 75 %, 95 %, most.
        sizes: a histogram of short sides: ``64-127`` -> images.
        labels: class name, or number where there are no names -> samples.
    """

    samples: int
    shards: int
    bytes: int
    looked_at: int
    unreadable: int
    members: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    quantiles: dict[str, list[float]]
    sizes: dict[str, int]
    labels: dict[str, int]


def collect_stats(
    pattern: str,
    remote: RemoteFiles,
    index_dir: str,
    max_samples: int | None,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Read samples and the headers of their images.

    Args:
        max_samples: so many at most, drawn without replacement; None: all.

    Raises:
        DataError: no shards, no manifest, or a store doesn't answer.
    """
    shards = read_shard_set(pattern, remote, index_dir)
    classes = class_names(shards, remote)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("members", "formats", "modes", "labels")}
    images: list[tuple[int, int, int]] = []  # width, height, bytes
    looked_at = unreadable = 0
    numbers = drawn_samples(shards.num_samples, max_samples, seed)
    for record in read_samples(shards, numbers, remote):
        looked_at += 1
        if looked_at % _PROGRESS_EVERY == 0:
            on_progress(looked_at, len(numbers))
        if record is None:
            unreadable += 1
            continue
        counts["members"].update(record.files.keys())
        label = label_of(record, classes)
        if label is not None:
            counts["labels"][label] += 1
        for extension, data in record.files.items():
            if extension in IMAGE_FORMATS and (header := _header(extension, data)) is not None:
                counts["formats"][header[0]] += 1
                counts["modes"][header[1]] += 1
                images.append((*header[2], len(data)))
                break
    in_order = {name: dict(sorted(c.items(), key=lambda item: (-item[1], item[0]))) for name, c in counts.items()}
    return Stats(
        samples=shards.num_samples,
        shards=len(shards.locations),
        bytes=shards.num_bytes,
        looked_at=looked_at,
        unreadable=unreadable,
        quantiles=_quantiles(images),
        sizes=_histogram([min(width, height) for width, height, _ in images]),
        **in_order,
    )


def drawn_samples(num_samples: int, max_samples: int | None, seed: int) -> list[int] | range:
    """Ascending positions in the data set, without replacement."""
    if max_samples is None or max_samples >= num_samples:
        return range(num_samples)
    return sorted(random.Random(seed).sample(range(num_samples), max_samples))


def read_samples(shards: ShardSet, numbers: list[int] | range, remote: RemoteFiles) -> Iterator[Record | None]:
    """The samples at these positions, in shards one after the other; None for a damaged one."""
    reader = ShardReader(shards, remote)
    ends = np.cumsum(shards.sizes)
    try:
        for number in numbers:
            shard = int(np.searchsorted(ends, number, "right"))
            try:
                yield reader.read(shard, number - int(ends[shard]) + shards.sizes[shard])
            except SampleError:
                yield None
    finally:
        reader.close()


def class_names(shards: ShardSet, remote: RemoteFiles, *, for_people: bool = True) -> Mapping[int, str]:
    """Label -> name, where the manifest of the first shard names classes.

    Args:
        for_people: ``tench`` rather than ``n01440764``, where there are both.
    """
    home = split_location(shards.index_locations[0])[0]
    schema: dict[str, Any] = read_manifest(home, remote).schema
    names = (for_people and schema.get("class_names")) or schema.get("classes") or []
    return {label: str(name) for label, name in enumerate(names)}


def label_of(record: Record, classes: Mapping[int, str]) -> str | None:
    """The name of a sample's class, its number where it has no name, None where it has no label."""
    try:
        label = decode_class(record, None)
    except SampleError:
        return None
    return classes.get(label, str(label))


def _header(extension: str, data: bytes) -> tuple[str, str, tuple[int, int]] | None:
    """(format, mode, upright width and height); None for what is no such image."""
    try:
        if extension == "npy":
            array = read_npy(data, _MAX_PIXELS)
            return "NPY", f"{array.shape[2]} x {array.dtype}", (array.shape[1], array.shape[0])
        image = Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[extension]])
        return str(image.format), image.mode, upright_size(*image.size, orientation_of(image))
    except Exception:  # decoders raise a dozen types on damaged files; `shards verify` tells which
        return None


def _quantiles(images: list[tuple[int, int, int]]) -> dict[str, list[float]]:
    if not images:
        return {}
    width, height, size = np.array(images, np.float64).T
    columns = {"width, px": width, "height, px": height, "pixels": width * height, "bytes": size}
    return {name: np.percentile(values, _QUANTILES).round(1).tolist() for name, values in columns.items()}


def _histogram(values: list[int]) -> dict[str, int]:
    """Counts in at most ten ranges of round width; empty ones at the ends are left away."""
    if not values:
        return {}
    least, most = min(values), max(values)
    if least == most:
        return {str(least): len(values)}
    step = 1
    while (most // step) - (least // step) >= _NUM_BINS:
        step *= 2
    bins = Counter(value // step for value in values)
    return {
        f"{place * step}-{place * step + step - 1}" if step > 1 else str(place): bins[place]
        for place in range(min(bins), max(bins) + 1)
    }
