"""Find every damaged byte of a shard set, and say which samples it hits: ``swinv2-scale shards verify``."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_scale.data.clips import VIDEO_EXTENSIONS
from swinv2_scale.data.images.decode import IMAGE_FORMATS
from swinv2_scale.data.inspection.contents import problems_of
from swinv2_scale.data.remote.files import RemoteFiles, is_remote, local_path
from swinv2_scale.data.shards.indexing import ShardScan, scan_shard, shown
from swinv2_scale.data.shards.manifest import INDEX_ENTRY, MANIFEST_NAME, manifest_text, parse_manifest, split_location
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.data.shards.stream import open_shard
from swinv2_scale.data.workers import in_order
from swinv2_scale.errors import DataError, SampleError

#: An extension that so many samples have is expected of all.
_NEARLY_ALL = 0.9
_MAX_EXAMPLES = 10
_NO_CONTENT = int.from_bytes(blake2b(digest_size=8).digest(), "little")


@dataclass(frozen=True)
class SampleProblem:
    """One damaged sample: its shard, its number in the index, its key as far as it can be known."""

    shard: str
    number: int
    key: str
    cause: str


@dataclass
class ShardReport:
    """What one shard looks like.

    Attributes:
        location: of the tar.
        samples: of its manifest entry.
        problems: of the shard as a whole.
        is_lost: none of its samples can be read.
        damaged: by sample number.
        notes: what is no damage.
        undecoded: how many samples have a file of each extension that can't be checked by decoding.
        extensions: sets of extensions -> the numbers of the samples that have them.
        keys: of the samples with sets that aren't the shard's most frequent one.
        digests: 8 bytes of a hash of each sample's content, in the order of the tar.
    """

    location: str
    samples: int
    problems: list[str] = field(default_factory=list)
    is_lost: bool = False
    damaged: dict[int, SampleProblem] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    undecoded: Counter[str] = field(default_factory=Counter)
    extensions: dict[frozenset[str], array[int]] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    digests: bytes = b""

    def add(self, number: int, key: str, cause: str) -> None:
        known = self.damaged.get(number)
        cause = f"{known.cause}; {cause}" if known else cause
        self.damaged[number] = SampleProblem(self.location, number, key, cause)


@dataclass(frozen=True)
class Verdict:
    """What all shards look like together.

    Attributes:
        num_damaged: samples that can't be used as they are, those of lost shards included.
        problems: of manifests and shards.
        damaged: samples, in the order of the shards; those of lost shards are not listed one by one.
    """

    num_samples: int
    num_damaged: int
    problems: list[str]
    damaged: list[SampleProblem]
    notes: list[str]

    @property
    def is_whole(self) -> bool:
        return not self.problems and not self.num_damaged


def verify(
    pattern: str,
    remote: RemoteFiles,
    index_dir: str,
    *,
    decode: bool = True,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Read everything: manifests, shards, indexes; then decode each file of each sample.

    Args:
        on_progress: called with how many shards have been read, of how many.

    Raises:
        DataError: no shards or no manifest that can be read, a shard that it doesn't list, a store that doesn't answer.
    """
    shards = read_shard_set(pattern, remote, index_dir)
    problems, notes, schemas = _check_manifests(shards, remote)
    check = partial(_check_shard, shards=shards, remote=remote, schemas=schemas, decode=decode)
    reports: list[ShardReport] = []
    numbers = range(len(shards.locations))
    for report in in_order(check, numbers, min(processes, max(len(numbers), 1))):
        reports.append(report)
        on_progress(len(reports), len(numbers))
    _find_missing_members(reports)
    notes += [note for report in reports for note in report.notes] + _undecoded(reports) + _duplicates(reports)
    return Verdict(
        shards.num_samples,
        sum(report.samples if report.is_lost else len(report.damaged) for report in reports),
        problems + [problem for report in reports for problem in report.problems],
        [report.damaged[number] for report in reports if not report.is_lost for number in sorted(report.damaged)],
        notes,
    )


def _check_manifests(shards: ShardSet, remote: RemoteFiles) -> tuple[list[str], list[str], dict[str, dict[str, Any]]]:
    """(problems, notes, schema by folder of the shards)."""
    problems, notes = [], []
    schemas: dict[str, dict[str, Any]] = {}
    used: dict[str, set[str]] = {}
    homes: dict[str, str] = {}
    for location, index in zip(shards.locations, shards.index_locations, strict=True):
        folder, name = split_location(location)
        used.setdefault(folder, set()).add(name)
        homes[folder] = split_location(index)[0]
    for folder, names in used.items():
        home = homes[folder]
        where = f"{home}/{MANIFEST_NAME}"
        text = manifest_text(home, remote)
        manifest = parse_manifest(text, where)
        schemas[folder] = manifest.schema
        data = json.loads(text)
        if "digest" not in data:
            notes.append(f"{where} is of an older version and has no digest of its own; shards index makes a new one")
        elif text != json.dumps(data, indent=1):
            problems.append(f"{where} was changed by something that isn't swinv2-scale, or is damaged")
        if not is_remote(folder):
            present = {path.name for path in Path(local_path(folder)).glob("*.tar")}
            if unread := len(manifest.entries.keys() - names):
                notes.append(f"{unread} other shards of {folder} were not asked for")
            extra = sorted(present - manifest.entries.keys())
            notes += [f"{folder}/{name} is not in the manifest" for name in extra]
    return problems, notes, schemas


def _check_shard(
    shard: int, *, shards: ShardSet, remote: RemoteFiles, schemas: dict[str, dict[str, Any]], decode: bool
) -> ShardReport:
    location, entry = shards.locations[shard], shards.entries[shard]
    schema = schemas[split_location(location)[0]]
    report = ShardReport(location, entry.samples)
    contents = _Contents(report, len(schema["classes"]) if "classes" in schema else None, decode)
    try:
        index = _read_index(shards, shard, remote)
    except (OSError, DataError) as error:
        index = b""
        report.is_lost = entry.samples > 0
        report.problems.append(_reason(shards.index_locations[shard], error))
    whole = len(index) // INDEX_ENTRY.size * INDEX_ENTRY.size
    contents.number_of = {start: number for number, (start, _, _) in enumerate(INDEX_ENTRY.iter_unpack(index[:whole]))}
    try:
        with open_shard(location, remote) as stream:
            scan = scan_shard(stream, location, entry.name, skip_damaged=True, on_sample=contents.look)
    except (OSError, DataError) as error:
        report.is_lost = True
        report.problems.append(_reason(location, error))
        return report
    if (scan.entry.bytes, scan.entry.sha256) == (entry.bytes, entry.sha256):
        _compare_index(report, scan, index, contents)
    elif not report.is_lost:
        _find_damage(report, scan, index, shards, shard, remote, contents)
    if left_out := sum(item["shard"] == entry.name for item in schema.get("left_out", [])):
        report.notes.append(f"{location}: {left_out} damaged samples were left out when it was indexed")
    return contents.finish()


class _Contents:
    """Looks at samples as the scan hands them out, whole or not."""

    def __init__(self, report: ShardReport, num_classes: int | None, decode: bool) -> None:
        self.number_of: dict[int, int] = {}  # start in the tar -> number in the index
        self.starts = array("Q")
        self.keys: list[str] = []
        self._report, self._num_classes, self._decode = report, num_classes, decode
        self._digests = array("Q")

    def look(self, start: int, key: str, files: dict[str, bytes]) -> None:
        self.starts.append(start)
        self.keys.append(shown(key))
        number = self.number_of.get(start)
        if number is None:
            return
        digest = blake2b(digest_size=8)
        for extension, data in sorted(files.items()):
            if extension != "cls" and not extension.endswith("json"):  # the same image with another label is a copy
                digest.update(data)
        self._digests.extend((number, int.from_bytes(digest.digest(), "little")))
        self._report.extensions.setdefault(frozenset(files), array("Q")).append(number)
        if self._decode:
            problems, undecoded = problems_of(key, files, self._num_classes)
            self._report.undecoded.update(undecoded)
            if problems:
                self._report.add(number, shown(key), "; ".join(problems))

    def key_at(self, offset: int, length: int) -> str:
        """The key of the sample that lies in these bytes, or of the last one before them."""
        place = bisect_right(self.starts, offset)
        if place and self.starts[place - 1] == offset:
            return self.keys[place - 1]
        if place < len(self.starts) and self.starts[place] < offset + length:
            return self.keys[place]  # its first header is the damaged one
        return f"after {self.keys[place - 1]}" if place else "the first"

    def finish(self) -> ShardReport:
        report = self._report
        sets = report.extensions
        usual = max(sets, key=lambda extensions: len(sets[extensions]), default=None)
        key_of = {
            self.number_of[start]: key
            for start, key in zip(self.starts, self.keys, strict=True)
            if start in self.number_of
        }
        for extensions, numbers in sets.items():
            if extensions != usual:
                report.keys.update((number, key_of[number]) for number in numbers)
        report.digests = self._digests.tobytes()
        return report


def _read_index(shards: ShardSet, shard: int, remote: RemoteFiles) -> bytes:
    location, wanted = shards.index_locations[shard], shards.entries[shard].samples * INDEX_ENTRY.size
    if is_remote(location):
        return remote.read_whole(location, wanted + INDEX_ENTRY.size)
    with open(local_path(location), "rb") as file:
        return file.read(wanted + INDEX_ENTRY.size)


def _compare_index(report: ShardReport, scan: ShardScan, index: bytes, contents: _Contents) -> None:
    """The tar is whole: what its index should be is known."""
    if report.is_lost:
        return
    size = INDEX_ENTRY.size
    if len(index) != len(scan.index) or scan.entry.samples != report.samples:
        report.problems.append(
            f"the index of {report.location} has {len(index) / size:g} entries, the manifest {report.samples}, "
            f"the tar {scan.entry.samples} whole samples"
        )
    for number in range(report.samples):
        right, found = scan.index[number * size : (number + 1) * size], index[number * size : (number + 1) * size]
        if not right:
            report.add(number, "", "the tar has no such sample")
        elif right != found:
            offset, length, _ = INDEX_ENTRY.unpack(right)
            report.add(number, contents.key_at(offset, length), "its entry in the index is damaged")


def _find_damage(
    report: ShardReport,
    scan: ShardScan,
    index: bytes,
    shards: ShardSet,
    shard: int,
    remote: RemoteFiles,
    contents: _Contents,
) -> None:
    """The tar isn't the one of the manifest: read each sample as training would."""
    entry = shards.entries[shard]
    if is_remote(report.location):
        remote.forget(entry.sha256, 0, entry.bytes)  # copies from when it was whole
    reader = ShardReader(shards, remote)
    before = len(report.damaged)
    for number in range(entry.samples):
        try:
            reader.read(shard, number)
        except SampleError as error:
            place = number * INDEX_ENTRY.size
            known = index[place : place + INDEX_ENTRY.size]
            offset, length, _ = INDEX_ENTRY.unpack(known) if len(known) == INDEX_ENTRY.size else (0, 0, 0)
            report.add(number, contents.key_at(offset, length), error.message.removeprefix(f"{report.location}: "))
    reader.close()
    what = f"{report.location} isn't as its manifest says: "
    what += (
        f"{scan.entry.bytes} bytes instead of {entry.bytes}"
        if scan.entry.bytes != entry.bytes
        else "its sha256 differs"
    )
    hit = len(report.damaged) - before
    report.problems.append(f"{what}; {f'samples hit: {hit}' if hit else 'no sample is hit, but bytes outside them'}")


def _find_missing_members(reports: list[ShardReport]) -> None:
    """Samples without a file that nearly all others have are damaged ones."""
    counts: Counter[str] = Counter()
    total = 0
    for report in reports:
        for extensions, numbers in report.extensions.items():
            total += len(numbers)
            counts.update(dict.fromkeys(_members(extensions), len(numbers)))
    expected = {member for member, count in counts.items() if _NEARLY_ALL * total <= count < total}
    for report in reports:
        for extensions, numbers in report.extensions.items():
            for lacking in sorted(expected - _members(extensions)):
                for number in numbers:
                    if number not in report.damaged:
                        share = f"{counts[lacking]} of {total} samples have one"
                        report.add(number, report.keys.get(number, ""), f"it has no {lacking}; {share}")


def _members(extensions: Iterable[str]) -> set[str]:
    """What a sample has, one name for all formats of images and clips: data sets mix them."""
    kinds = {**dict.fromkeys(IMAGE_FORMATS, "image"), **dict.fromkeys(VIDEO_EXTENSIONS, "clip")}
    return {kinds.get(extension, f".{extension}") for extension in extensions}


def _undecoded(reports: list[ShardReport]) -> list[str]:
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.undecoded)
    return [
        f".{extension} files that were read but not decoded: {count}" for extension, count in sorted(counts.items())
    ]


def _duplicates(reports: list[ShardReport]) -> list[str]:
    pairs = [np.frombuffer(report.digests, np.uint64).reshape(-1, 2) for report in reports]
    digests = np.concatenate([pair[:, 1] for pair in pairs]) if pairs else np.empty(0, np.uint64)
    _, first, inverse, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    is_copy = (counts[inverse] > 1) & (first[inverse] != np.arange(len(digests)))
    copies = np.flatnonzero(is_copy & (digests != _NO_CONTENT))
    if not len(copies):
        return []
    ends = np.cumsum([len(pair) for pair in pairs])

    def name(place: int) -> str:
        shard = int(np.searchsorted(ends, place, "right"))
        row = place - (int(ends[shard - 1]) if shard else 0)
        return f"{Path(reports[shard].location).name} sample {pairs[shard][row, 0]}"

    examples = [f"{name(int(place))} = {name(int(first[inverse[place]]))}" for place in copies[:_MAX_EXAMPLES]]
    more = ", .." if len(copies) > _MAX_EXAMPLES else ""
    return [f"samples with the same content as another: {len(copies)} ({', '.join(examples)}{more})"]


def _reason(location: str, error: Exception) -> str:
    if isinstance(error, DataError):
        return error.message
    return f"{location} is missing" if isinstance(error, FileNotFoundError) else f"{location} cannot be read: {error}"
