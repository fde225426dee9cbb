"""Write samples into WebDataset tars with a manifest: the whole folder, or nothing."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from swinv2_scale.data.shards.indexing import scan_shard
from swinv2_scale.data.shards.labels import LabelCount
from swinv2_scale.data.shards.manifest import ShardEntry, index_location, write_manifest
from swinv2_scale.durable import sync_file
from swinv2_scale.errors import DataError, OutputError

#: A sample: ``__key__`` and one value a file extension, bytes already.
RawSample = dict[str, str | bytes]


def write_shards(
    samples: Iterable[RawSample],
    folder: Path,
    *,
    samples_per_shard: int,
    made_by: str | dict[str, Any],
    bytes_per_shard: int | None = None,
    schema: dict[str, Any] | None = None,
) -> int:
    """Write ``000000.tar``, ``000001.tar``, ... , their indexes and the manifest.

    Same samples, same bytes: members carry no time, owner or host. The folder appears under its name when all of it
    is on disk.

    Args:
        bytes_per_shard: a tar has at most so many, unless one sample alone has more; None: any number.
        schema: of the manifest; ``members`` is counted here.

    Returns:
        How many samples were written.

    Raises:
        OutputError: the folder exists already, or can't be written.
        DataError: a sample without files, one too large for readers, a key that is there twice in a shard, or one
            that WebDataset doesn't read.
    """
    with new_folder(folder) as part:
        tars = ShardTars(part, samples_per_shard, bytes_per_shard)
        try:
            for sample in samples:
                tars.add(tar_block(sample))
            tars.finish()
        finally:
            tars.close()
        write_manifest(part, tars.entries, made_by, {**(schema or {}), **tars.counted})
    return sum(entry.samples for entry in tars.entries)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which gets the name ``folder`` when the block ends, and is removed if it fails.

    Raises:
        OutputError: ``folder`` is there already, even as a broken link, or can't be written; any OSError of the block.
    """
    if os.path.lexists(folder):
        raise OutputError(f"{folder} exists already; nothing was overwritten", "choose another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield part
            part.chmod(0o755)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}", "free some space or choose another folder") from error


class ShardTars:
    """``000000.tar``, ``000001.tar``, ... in a folder, each closed at whichever bound comes first.

    Args:
        folder: exists.
        bytes_per_shard: of the file, ends and padding included.
        entries: shards that are there already.

    Attributes:
        entries: the finished shards; their tars and indexes have reached the disk.
        members, labels: how many samples have each extension, and their labels, of the shards that were finished here.
    """

    def __init__(
        self,
        folder: Path,
        samples_per_shard: int,
        bytes_per_shard: int | None = None,
        entries: Iterable[ShardEntry] = (),
    ) -> None:
        self.folder = folder
        self.entries = list(entries)
        self.members: Counter[str] = Counter()
        self.labels = LabelCount()
        self._bounds = samples_per_shard, bytes_per_shard
        self._file: BinaryIO | None = None
        self._samples = 0

    def add(self, block: bytes) -> ShardEntry | None:
        """Write a sample of ``tar_block``; returns the shard that was finished because the sample didn't fit into it.

        Raises:
            OSError: from the disk.
        """
        max_samples, max_bytes = self._bounds
        finished = None
        if self._file is not None:
            too_long = max_bytes is not None and _padded(self._file.tell() + len(block)) > max_bytes
            if self._samples == max_samples or too_long:
                finished = self.finish()
        if self._file is None:
            self._file = (self.folder / f"{len(self.entries):06d}.tar").open("wb")
            self._samples = 0
        self._file.write(block)
        self._samples += 1
        return finished

    def finish(self) -> ShardEntry | None:
        """End the shard that is being written; None if there is none.

        Raises:
            DataError: a key is there twice, or WebDataset doesn't read it.
            OSError: from the disk.
        """
        if self._file is None:
            return None
        path = Path(self._file.name)
        end = self._file.tell()
        self._file.write(bytes(_padded(end) - end))
        sync_file(self._file)
        self.close()
        with path.open("rb") as stream:
            scan = scan_shard(stream, str(path), path.name)
        if scan.entry.samples != self._samples:
            raise DataError(
                f"{path}: WebDataset reads {scan.entry.samples} of the {self._samples} samples that were written",
                "give keys without dots, and not as __this__/",
            )
        with Path(index_location(str(path))).open("wb") as index:
            index.write(scan.index)
            sync_file(index)
        self.entries.append(scan.entry)
        self.members.update(scan.members)
        self.labels += scan.labels
        return scan.entry

    @property
    def counted(self) -> dict[str, Any]:
        """For the manifest's schema."""
        return {"members": dict(sorted(self.members.items())), **self.labels.as_schema()}

    def close(self) -> None:
        """Close the file of a shard that is not finished; it stays as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None


def tar_block(sample: RawSample) -> bytes:
    """The sample's part of a tar: a header and the content of each file, in the order of extensions.

    Raises:
        DataError: it has no files.
    """
    key = sample["__key__"]
    assert isinstance(key, str)
    parts = []
    for extension in sorted(name for name in sample if not name.startswith("_")):
        value = sample[extension]
        data = value.encode() if isinstance(value, str) else value
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode = len(data), 0o444
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        parts += [header, data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    if not parts:
        raise DataError(f"sample {key!r} has no files")
    return b"".join(parts)


def _padded(size: int) -> int:
    """Of a whole tar whose members take ``size``: two empty blocks end it, and it fills whole records."""
    return -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
