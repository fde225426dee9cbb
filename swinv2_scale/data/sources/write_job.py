"""Write a source's samples as shards with many processes, so that it can be stopped at any time and gone on with.

``DST.part/`` holds everything until ``DST`` appears by one rename:

    lock           held while a process writes
    listing.jsonl  each sample of the source: key, label, checksum of its JSON, path, size and time of its files
    plan.json      the options; written last, so where it is the listing is whole
    progress.jsonl a line for each finished shard: its manifest entry, and the position that the next one starts at
    shards/        becomes DST

A shard depends on the samples from its first position on and on nothing else, so what an interrupted job and its
successors write is, to the byte, what one job writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from swinv2_scale.data.shards.labels import LabelCount
from swinv2_scale.data.shards.manifest import ShardEntry, index_location, write_manifest
from swinv2_scale.data.shards.writer import ShardTars
from swinv2_scale.data.sources.listing import Item, Source
from swinv2_scale.data.sources.preparation import Rejected, Treatment, prepare
from swinv2_scale.data.workers import in_order
from swinv2_scale.draws import key_of, permuted
from swinv2_scale.durable import sync_file, sync_folder, write_whole
from swinv2_scale.errors import ConfigError, DataError, OutputError

REJECTED_NAME = "rejected.jsonl"
_NAMES = {"lock", "listing.jsonl", "plan.json", "plan.json.part", "progress.jsonl", "shards"}


@dataclass(frozen=True)
class WriteOptions:
    """What the bytes of the shards depend on, beside the source.

    Attributes:
        made_by: what the manifest says about their making; the same for a job and its successors.
        samples_per_shard: at most, and
        bytes_per_shard: at most, unless one sample has more.
        treatment: of each image.
        seed: of the order that samples are written in; None keeps the source's.
    """

    made_by: dict[str, Any]
    samples_per_shard: int
    bytes_per_shard: int | None
    treatment: Treatment
    seed: int | None

    def as_json(self) -> dict[str, Any]:
        """All of it, by names like those of the command line."""
        options = asdict(self)
        return {**options.pop("made_by"), **options.pop("treatment"), **options}


@dataclass
class Progress:
    """What the finished shards hold.

    Attributes:
        next: position in the order of writing that is to be written next.
    """

    next: int = 0
    entries: list[ShardEntry] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    labels: LabelCount = field(default_factory=LabelCount)
    rejected: list[Rejected] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """One line of progress.jsonl."""
        self.entries.append(ShardEntry(**line["shard"]))
        self.members.update(line["members"])
        self.labels += LabelCount(**line.get("labels", {}))
        self.rejected += [Rejected(**rejected) for rejected in line["rejected"]]
        self.next = line["next"]


@dataclass(frozen=True)
class Summary:
    samples: int
    shards: int
    bytes: int
    left_out: int


def write_source(
    source: Source,
    destination: Path,
    options: WriteOptions,
    *,
    processes: int = 1,
    skip_damaged: bool = False,
    resume: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Write ``source`` to the folder ``destination``, which appears when all of it is on disk.

    Args:
        skip_damaged: damaged samples are left out and listed in ``rejected.jsonl``, instead of ending this.
        resume: go on with what an interrupted job left in ``destination.part``, if there is something.
        on_progress: is told how many of the source's samples are done; first after the processes have started.

    Raises:
        OutputError: the destination exists, or ``destination.part`` while not resuming or while another job uses it,
            or the disk is full; then finished shards stay and this can be gone on with.
        ConfigError: the interrupted job had other options.
        DataError: a damaged sample, no sample at all, or the source isn't what it was when the job was interrupted.
    """
    if os.path.lexists(destination):
        raise OutputError(f"{destination} exists already; nothing was overwritten", "choose another, or remove it")
    part = destination.with_name(destination.name + ".part")
    if part.exists() and not (resume and part.is_dir()):
        raise OutputError(
            f"{part} is what an interrupted job left", f"go on with it: --resume; or start anew: remove {part}"
        )
    # A link isn't ours either: what isn't finished is deleted in shards/, wherever that is.
    there = list(part.iterdir()) if part.exists() else []
    foreign = sorted(path.name for path in there if path.name not in _NAMES or path.is_symlink())
    if foreign:
        raise OutputError(f"{part} holds what this did not write: {foreign[0]}", "move it, or choose another folder")
    try:
        (part / "shards").mkdir(parents=True, exist_ok=True)
        with _Lock(part):
            if (part / "plan.json").exists():
                _check_plan(part, options)
                _check_listing(part, source)
            else:
                _write_plan(part, options, source)
            progress = _read_progress(part)
            _write_tars(part, source, options, progress, processes, skip_damaged, on_progress)
            _publish(part, destination, source, options, progress)
    except OSError as error:
        raise OutputError(
            f"cannot write {part}: {error}", "make room or mend that, then go on with --resume"
        ) from error
    entries = progress.entries
    return Summary(
        sum(entry.samples for entry in entries),
        len(entries),
        sum(entry.bytes for entry in entries),
        len(progress.rejected),
    )


class _Lock:
    """Keeps two jobs off one folder; the kernel frees it with the process. Workers don't inherit a record lock."""

    def __init__(self, part: Path) -> None:
        self._part = part
        self._file = (part / "lock").open("a")

    def __enter__(self) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process is writing {self._part}", "wait for it, or stop it") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _write_plan(part: Path, options: WriteOptions, source: Source) -> None:
    with (part / "listing.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _listing(source))
        sync_file(file)
    write_whole(part / "plan.json", json.dumps(options.as_json(), indent=1))


def _listing(source: Source) -> Iterator[str]:
    for item in source.items:
        files = []
        for path in item.files:
            try:
                stat = (source.root / path).stat()
            except OSError as error:
                raise DataError(f"cannot read {source.root / path}: {error}") from error
            files.append([path, stat.st_size, stat.st_mtime_ns])
        yield json.dumps([item.key, item.label, zlib.crc32(item.json or b""), *files])


def _check_plan(part: Path, options: WriteOptions) -> None:
    try:
        was = json.loads((part / "plan.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part / 'plan.json'} is damaged: {error}", f"start anew: remove {part}") from error
    now = options.as_json()
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    changed = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]
    if changed:
        raise ConfigError(
            f"{part} was begun with other options: {'; '.join(changed)}",
            f"give --resume the same options, or start anew: remove {part}",
        )


def _check_listing(part: Path, source: Source) -> None:
    with (part / "listing.jsonl").open(encoding="utf-8") as file:
        for was, now in zip_longest(map(str.rstrip, file), _listing(source)):
            if was != now:
                raise DataError(
                    f"the source has changed since {part} was begun: there was {was or 'nothing'}, now there is "
                    f"{now or 'nothing'} (key, label, checksum of the rest; path, bytes, time of each file)",
                    f"bring it back, or start anew: remove {part}",
                )


def _read_progress(part: Path) -> Progress:
    """What was finished; a line that an interruption tore is cut off.

    Raises:
        DataError: a shard that was finished is missing.
    """
    progress = Progress()
    path = part / "progress.jsonl"
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            progress.add(json.loads(line) if line.endswith(b"\n") else {})
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        whole += len(line)
    if path.exists():
        os.truncate(path, whole)
    unfinished = {file.name for file in (part / "shards").iterdir()}
    for entry in progress.entries:
        shard = part / "shards" / entry.name
        index = Path(index_location(str(shard)))
        if not shard.exists() or not index.exists() or shard.stat().st_size != entry.bytes:
            raise DataError(f"{shard} was finished and isn't whole any more", f"start anew: remove {part}")
        unfinished -= {shard.name, index.name}
    for name in unfinished:
        (part / "shards" / name).unlink()
    return progress


def _write_tars(
    part: Path,
    source: Source,
    options: WriteOptions,
    progress: Progress,
    processes: int,
    skip_damaged: bool,
    on_progress: Callable[[int], None],
) -> None:
    """Write from ``progress.next`` to the end, keeping ``progress`` and its file up to date."""
    rejected: list[Rejected] = []
    tars = ShardTars(part / "shards", options.samples_per_shard, options.bytes_per_shard, progress.entries)
    first = progress.next
    work = partial(prepare, root=source.root, treatment=options.treatment, max_mask_value=source.max_mask_value)
    results = in_order(work, _ordered(source, options.seed, first), processes)

    def note(entry: ShardEntry | None, position: int) -> None:
        if entry is None:
            return
        line = {
            "shard": asdict(entry),
            "next": position,
            **tars.counted,
            "rejected": [asdict(one) for one in rejected],
        }
        with (part / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            sync_file(file)
        progress.add(line)
        rejected.clear()
        tars.members.clear()
        tars.labels = LabelCount()

    try:
        for position, result in enumerate(results, start=first):
            if isinstance(result, bytes):
                note(tars.add(result), position)
            elif skip_damaged:
                rejected.append(result)
            else:
                raise DataError(
                    f"{source.root / result.path}: {result.cause}",
                    "mend or remove the file and start anew, or go on without damaged ones: --resume --skip-damaged",
                )
            on_progress(position + 1)
        note(tars.finish(), len(source.items))
    finally:
        results.close()
        tars.close()
    progress.rejected += rejected


def _ordered(source: Source, seed: int | None, first: int) -> Iterator[Item]:
    """The samples from position ``first`` on, in the order that they are written in."""
    size = len(source.items)
    if seed is None:
        yield from source.items[first:]
        return
    key = key_of(seed, "shards write")
    for position in range(first, size):
        yield source.items[permuted(position, size, key)]


def _publish(part: Path, destination: Path, source: Source, options: WriteOptions, progress: Progress) -> None:
    shards = part / "shards"
    if not progress.entries:
        raise DataError(
            f"none of the {len(source.items)} samples is whole; the first: {progress.rejected[0].path}: "
            f"{progress.rejected[0].cause}"
        )
    if progress.rejected:
        lines = [json.dumps(asdict(rejected)) + "\n" for rejected in progress.rejected]
        write_whole(shards / REJECTED_NAME, "".join(lines))
    members = dict(sorted(progress.members.items()))
    schema = {**source.schema, "members": members, **progress.labels.as_schema()}
    write_manifest(shards, progress.entries, options.as_json(), schema)
    os.rename(shards, destination)
    sync_folder(destination.parent)
    shutil.rmtree(part)
