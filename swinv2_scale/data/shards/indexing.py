"""Make the index of a shard, whoever made it: one pass over its bytes, and every sample accounted for.

What can be seen in a tar without knowing its checksum: a cut, a header that was changed, a name that comes twice, a
file that is no file. Changed bytes of content can't; they are what the index's checksums are for, from then on.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from swinv2_scale.data.shards.labels import LABEL_EXTENSIONS, LabelCount
from swinv2_scale.data.shards.manifest import MAX_SAMPLE_BYTES, ShardEntry, is_part_of_a_sample, sample_key
from swinv2_scale.data.shards.tar_walk import Gap, Member, Readable, TarWalk
from swinv2_scale.errors import DataError, printable

#: Extensions that are told apart; a shard with more of them has them counted as one.
_MAX_EXTENSIONS = 62
#: A longer .json is no label.
_MAX_LABEL_BYTES = 2**16
#: Names in tars can be of any length and hold anything; this much of them is kept for people.
_MAX_SHOWN = 120
_PACK_ANEW = "pack it anew, files only and in the order of their names (tar --sort=name)"

#: Called with start (byte in the tar), key and files (by extension) of each sample as it ends, whole or not.
OnSample = Callable[[int, str, dict[str, bytes]], None]


@dataclass(frozen=True)
class LeftOut:
    """A sample that isn't whole, or is too large to be read, so that the index doesn't have it.

    Attributes:
        key: of the sample, or ``after KEY`` where its own key was lost.
        samples: 1, or 0 for a tar that is cut between two samples, after which an unknown number is missing.
    """

    shard: str
    key: str
    cause: str
    samples: int = 1


@dataclass(frozen=True)
class ShardScan:
    """All that one pass over a tar tells.

    Attributes:
        index: the bytes of its index: offset, length, CRC-32 of each whole sample.
        members: how many whole samples have each extension.
        labels: of the samples, those left out included where their label was read.
        is_cut: more samples may have followed than ``left_out`` lists.
        passed_over: files that are no part of a sample, as WebDataset sees it: without extension, hidden, ``__x__``.
    """

    entry: ShardEntry
    index: bytes
    members: dict[str, int]
    left_out: list[LeftOut]
    is_cut: bool
    passed_over: int
    labels: LabelCount


def scan_shard(
    stream: Readable, location: str, name: str, *, skip_damaged: bool = False, on_sample: OnSample | None = None
) -> ShardScan:
    """Read a tar once, from its beginning to its end. Memory doesn't grow with the tar but for 250 bytes a sample.

    Args:
        stream: needs nothing but ``read``.
        location: for messages.
        name: of the shard in its manifest.
        skip_damaged: list what isn't whole instead of stopping at it. Samples beside a damaged place are whole if
            others of the shard, away from damage, have exactly their extensions.
        on_sample: asks for the content of samples, which are then held in memory one at a time; of one that is larger
            than a reader takes, only the files before it grew too large.

    Raises:
        DataError: damage or a sample of more than ``MAX_SAMPLE_BYTES``, where ``skip_damaged`` is False.
        OSError: of the stream.
    """
    walk = TarWalk(stream)
    samples = _Samples(location, skip_damaged, on_sample)
    is_cut = False
    while (found := walk.step()) is not None:
        if isinstance(found, Gap):
            is_cut |= found.is_cut
            samples.gap(found)
            continue
        samples.begin(found)
        for piece in walk.content(found):
            samples.add(piece)
        samples.end(walk.offset)
    rows, members, left_out = samples.finish(name)
    entry = ShardEntry(name, len(rows), walk.offset, walk.sha256.hexdigest())
    index = rows.astype("<u8").tobytes()
    return ShardScan(entry, index, members, left_out, is_cut, samples.passed_over, samples.labels)


def shown(key: str) -> str:
    """A key for people: printable, of a bounded length."""
    return printable(key if len(key) <= _MAX_SHOWN else key[:_MAX_SHOWN] + "...")


class _Samples:
    """Gathers members into samples, and what is wrong with them.

    A row is a sample that was begun: start, length, CRC-32, extensions (one bit each). Memory is what matters: a
    shard may have a million, so keys are kept as hashes.
    """

    def __init__(self, location: str, skip_damaged: bool, on_sample: OnSample | None) -> None:
        self.passed_over = 0
        self.labels = LabelCount()
        self._location, self._skips, self._on_sample = location, skip_damaged, on_sample
        self._rows = array("Q")
        self._row_of: dict[int, int] = {}  # hash of the key -> its first row
        self._bits: dict[str, int] = {}
        self._dropped: dict[int, LeftOut | None] = {}  # row -> why; None: it is listed with another row already
        self._doubts: dict[int, tuple[str, str]] = {}  # row -> (key, why it may not be whole)
        self._gaps: list[tuple[Gap, str, list[int]]] = []  # gap, the key before it, the rows beside it
        # The sample that is being read.
        self._key, self._last_whole = "", ""
        self._extensions = self._earlier = 0
        self._start = self._end = self._crc = self._running = 0
        self._files: dict[str, bytes] = {}
        self._label_files: dict[str, bytes] = {}
        self._is_open = False
        self._gap_since: Gap | None = None
        self._member: Member | None = None
        self._keeps_content = self._is_label = False
        self._pieces: list[bytes] = []

    def begin(self, member: Member) -> None:
        is_sample = member.kind != "directory" and is_part_of_a_sample(member.name)
        if not is_sample:
            self.passed_over += member.kind != "directory"
            self._running = zlib.crc32(member.headers, self._running)
            self._member = None
            return
        key = sample_key(member.name)
        if member.kind == "other" and not self._skips:
            self._stop(f"{shown(member.name)!r} is no plain file (a link, sparse, ..); shards hold files only", member)
        extension = member.name[len(key) + 1 :].lower()
        bit = self._bit(extension)
        if not self._is_open or key != self._key or self._extensions & bit:
            self._close()
            self._open(key, member)
        elif self._gap_since is not None:
            self._drop(self._gap_since.cause)
        self._running = zlib.crc32(member.headers, self._running)
        self._gap_since = None
        self._extensions |= bit
        self._member, self._pieces = member, []
        self._is_label = extension in LABEL_EXTENSIONS and member.stored_bytes <= _MAX_LABEL_BYTES
        self._keeps_content = self._on_sample is not None or self._is_label
        if member.kind == "other":
            self._drop(f"{shown(member.name)!r} is no plain file (a link, sparse, ..)")
        if member.start + len(member.headers) + member.stored_bytes - self._start > MAX_SAMPLE_BYTES:
            self._keeps_content = False
            cause = f"the sample has more than {MAX_SAMPLE_BYTES} bytes, the most that a reader takes"
            if not self._skips:
                self._stop(cause, member, "make smaller samples of it")
            self._drop(cause)

    def add(self, piece: bytes) -> None:
        self._running = zlib.crc32(piece, self._running)
        if self._keeps_content and self._member is not None:
            self._pieces.append(piece)

    def end(self, offset: int) -> None:
        """The member that was begun ends at this byte of the tar."""
        if self._member is None:
            return
        self._end, self._crc = offset, self._running
        if self._keeps_content:
            extension = self._member.name[len(self._key) + 1 :].lower()
            content, self._pieces = b"".join(self._pieces)[: self._member.stored_bytes], []
            if self._is_label:
                self._label_files[extension] = content
            if self._on_sample is not None:
                self._files[extension] = content

    def gap(self, gap: Gap) -> None:
        if not self._skips:
            self._stop(gap.cause, gap)
        if self._is_open and self._member is not None and gap.start == self._member.start:
            self._drop(gap.cause)  # cut inside this very member
        if gap.has_lost_a_member or gap.is_cut:
            beside = [self._row] if self._is_open else []
            self._doubts.update((row, (self._key, gap.cause)) for row in beside)
            self._gaps.append((gap, self._key, beside))
            self._gap_since = gap
        else:
            self._close()  # a sample's bytes are checksummed in one piece

    def finish(self, name: str) -> tuple[NDArray[np.uint64], dict[str, int], list[LeftOut]]:
        """(offset, length and CRC-32 of whole samples (N, 3), samples with each extension, what is left out)."""
        self._close()
        rows = np.frombuffer(self._rows, np.uint64).reshape(-1, 4) if self._rows else np.empty((0, 4), np.uint64)
        self._judge_doubts(rows)
        places = [
            (int(rows[row, 0]), LeftOut(name, shown(why.key), why.cause, why.samples))
            for row, why in self._dropped.items()
            if why is not None
        ]
        for gap, key, beside in self._gaps:
            if not any(row in self._dropped for row in beside):
                lost = LeftOut(name, f"after {shown(key)}", gap.cause, int(gap.has_lost_a_member))
                places.append((gap.start, lost))
        is_kept = np.ones(len(rows), bool)
        is_kept[list(self._dropped)] = False
        kept = rows[is_kept]
        members = {e: int(np.count_nonzero(kept[:, 3] & np.uint64(bit))) for e, bit in self._bits.items()}
        return (
            kept[:, :3],
            {e: n for e, n in members.items() if n},
            [left for _, left in sorted(places, key=lambda item: item[0])],
        )

    @property
    def _row(self) -> int:
        return len(self._rows) // 4 - 1

    def _open(self, key: str, member: Member) -> None:
        digest = int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
        if digest in self._row_of and not self._skips:
            self._stop(f"sample {shown(key)!r} is there twice, or its files don't follow each other", member)
        self._rows.extend((member.start, 0, 0, 0))
        self._key, self._start, self._extensions, self._running = key, member.start, 0, 0
        self._files, self._label_files, self._is_open = {}, {}, True
        self._earlier = self._row_of.setdefault(digest, self._row)
        if self._gap_since is not None:
            self._doubts[self._row] = (key, self._gap_since.cause)
            self._gaps[-1][2].append(self._row)

    def _close(self) -> None:
        if not self._is_open:
            return
        row, self._is_open = self._row, False
        self._rows[4 * row + 1] = self._end - self._start
        self._rows[4 * row + 2] = self._crc
        self._rows[4 * row + 3] = self._extensions
        if self._earlier != row:
            self._judge_second(row)
        self._last_whole = self._key
        if row not in self._dropped:
            self.labels = self.labels.with_sample(self._label_files)
        if self._on_sample is not None:
            self._on_sample(self._start, self._key, self._files)

    def _judge_second(self, row: int) -> None:
        """The key was there before: a second sample, or more files of the first."""
        first = self._earlier
        if self._rows[4 * first + 3] & self._extensions:
            self._drop("its key is there twice; the first is kept")
            self._doubts.setdefault(first, (self._key, "its key is there twice"))
            return
        self._rows[4 * first + 3] |= self._extensions
        why = LeftOut("", self._key, "its files don't follow each other")
        if self._dropped.get(first) is None:
            self._dropped[first] = why
        self._dropped[row] = None

    def _drop(self, cause: str) -> None:
        """The open sample, or the one that has just been closed, is not whole."""
        self._dropped.setdefault(self._row, LeftOut("", self._key, cause))

    def _judge_doubts(self, rows: NDArray[np.uint64]) -> None:
        is_sure = np.ones(len(rows), bool)
        is_sure[list(self._dropped)] = False
        judged = is_sure.copy()
        is_sure[list(self._doubts)] = False
        if is_sure.any():
            whole = {int(x) for x in np.unique(rows[is_sure, 3])}
        else:
            whole = {int(np.bitwise_or.reduce(rows[judged, 3]))} if judged.any() else set()
        names = {bit: extension for extension, bit in self._bits.items()}
        for row, (key, cause) in self._doubts.items():
            mask = int(rows[row, 3])
            if row in self._dropped or mask in whole:
                continue
            has = ", ".join(name for bit, name in names.items() if mask & bit)
            self._dropped[row] = LeftOut("", key, f"{cause}; it has {has} only")

    def _bit(self, extension: str) -> int:
        if extension not in self._bits and len(self._bits) < _MAX_EXTENSIONS:
            self._bits[extension] = 1 << len(self._bits)
        return self._bits.get(extension, 1 << _MAX_EXTENSIONS)

    def _stop(self, cause: str, at: Member | Gap, remedy: str = _PACK_ANEW) -> NoReturn:
        where = f", in or after sample {self._row} ({shown(self._key)!r})" if self._is_open else ""
        before = f"; the last whole sample is {shown(self._last_whole)!r}" if self._row > 0 else ""
        skip = "leave out what is damaged: swinv2-scale shards index --skip-damaged"
        if isinstance(at, Gap):
            message = f"{self._location} is cut or damaged at byte {at.start}{where}{before}: {cause}"
            raise DataError(message, f"copy it again, or {skip}")
        raise DataError(
            f"{self._location} at byte {at.start}{where}: {cause}",
            f"{remedy}, or {skip}",
        )
