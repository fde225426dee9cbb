"""The members of a tar, read once and in order from anything that can be read, and the places where it is damaged.

Python's tarfile takes a block that is no header, or a file that ends early, for the end of the archive, and keeps every
member in memory. Here nothing ends unnoticed, and after a broken header the walk goes on at the next one.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_CHUNK = 2**20
#: Headers of one member together, long names included; more is damage or an attack on our memory.
_MAX_HEADERS = 2**22
_PAX_RECORD = re.compile(rb"\d+ [^=\n]+=")
#: A header has a hundred bytes that aren't zero; what has less is a damaged end mark.
_MIN_HEADER_BYTES = 24


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One entry of a tar.

    Attributes:
        start: of its first header, long names' headers included.
        headers: these bytes.
        name: as text; bytes that are no UTF-8 as surrogates. From outside, never a path.
        stored_bytes: of content that follow the headers, without padding.
    """

    start: int
    headers: bytes
    name: str
    kind: Literal["file", "directory", "other"]
    stored_bytes: int


@dataclass(frozen=True)
class Gap:
    """A stretch without a readable member.

    Attributes:
        is_cut: the tar ends here, and how much followed can't be known.
        has_lost_a_member: at least one member was here; False where only an end mark is missing or damaged.
    """

    start: int
    cause: str
    is_cut: bool
    has_lost_a_member: bool


class TarWalk:
    """Steps through a tar. ``content`` of a member is read to its end before the next ``step``.

    Attributes:
        offset: bytes read so far.
        sha256: of everything read, the whole file once ``step`` has returned None.
    """

    def __init__(self, stream: Readable) -> None:
        self.offset = 0
        self.sha256 = hashlib.sha256()
        self._stream = stream
        self._ahead = b""  # a block that was read by looking for the next header
        self._cut: Gap | None = None
        self._has_ended = False

    def step(self) -> Member | Gap | None:
        """The next member or damage; None at the end of a file whose end mark is right."""
        if self._cut is not None:
            gap, self._cut, self._has_ended = self._cut, None, True
            return gap
        if self._has_ended:
            return None
        start, headers, changes = self.offset, b"", _Changes()
        while True:
            block = self._take(_BLOCK)
            if len(block) < _BLOCK:
                return self._end_inside_header(start, bool(headers or block))
            if block == _ZEROS and not headers:
                return self._zeros(start)
            info = _header(block)
            if block[:2] == b"\x1f\x8b" and self.offset == _BLOCK:
                return self._gap(start, "it is compressed (gzip); a shard is a plain tar", block)
            if info is None or info.size < 0 or len(headers) > _MAX_HEADERS:
                return self._gap(start, f"the header at byte {self.offset - _BLOCK} is unreadable", block, block)
            if info.type in _EXTENDED and info.size > _MAX_HEADERS:
                return self._gap(start, f"a name of {info.size} bytes at byte {start}", block, block)
            headers += block
            if info.type not in _EXTENDED:
                return _member(start, headers, info, changes)
            body = self._take(_padded(info.size))
            if len(body) < _padded(info.size):
                return self._end_inside_header(start, True)
            headers += body
            try:
                changes.take(info.type, body[: info.size])
            except ValueError as error:
                cause = f"the extended header at byte {self.offset - len(body)} is damaged: {error}"
                return self._gap(start, cause, block, block)
            if info.type == tarfile.XGLTYPE and not start:  # it is about all members, so it belongs to none
                start, headers = self.offset, b""

    def content(self, member: Member) -> Iterator[bytes]:
        """The member's content with its padding, in pieces. Ends early where the tar does; ``step`` tells then."""
        left = _padded(member.stored_bytes)
        while left:
            piece = self._take(min(left, _CHUNK))
            yield piece
            left -= len(piece)
            if left and not piece:
                self._cut = Gap(member.start, f"the tar is cut at byte {self.offset}, inside a member", True, True)
                return

    def _take(self, size: int) -> bytes:
        pieces, length = [self._ahead], len(self._ahead)
        self._ahead = b""
        while length < size:
            piece = self._stream.read(min(size - length, _CHUNK))
            if not piece:
                break
            self.sha256.update(piece)
            pieces.append(piece)
            length += len(piece)
        self.offset += length
        return b"".join(pieces)

    def _end_inside_header(self, start: int, has_begun: bool) -> Gap:
        self._has_ended = True
        what = "inside a header" if has_begun else "without an end mark"
        return Gap(start, f"the tar is cut at byte {self.offset}, {what}", True, has_begun)

    def _zeros(self, start: int) -> Gap | None:
        """After a first block of zeros: the end mark, or a header that was overwritten."""
        count = 1
        while True:
            block = self._take(_BLOCK)
            if len(block) < _BLOCK and not block.strip(b"\0"):
                self._has_ended = True
                return None
            if block != _ZEROS:
                break
            count += 1
        if count == 1:
            cause = f"a block of zeros at byte {start}, where a header should be"
        else:
            cause = f"something follows the end mark at byte {start} (tars joined by cat?)"
        if _header(block) is not None:
            self._put_back(block)
            return Gap(start, cause, False, count == 1)
        gap = self._gap(start, cause, block)
        return Gap(gap.start, gap.cause, gap.is_cut and count == 1, gap.has_lost_a_member and count == 1)

    def _gap(self, start: int, cause: str, block: bytes, lost_header: bytes = b"") -> Gap:
        """From a block that is no header to the next that is one, or to the end."""
        # What follows a lost long name has the wrong name and is lost with it.
        is_orphan = lost_header[156:157] in _EXTENDED and lost_header[257:262] == b"ustar"
        most_bytes, trailing_zeros = 0, 0
        while len(block) == _BLOCK:
            previous = block
            most_bytes = max(most_bytes, _BLOCK - block.count(0))
            trailing_zeros = trailing_zeros + 1 if block == _ZEROS else 0
            block = self._take(_BLOCK)
            info = _header(block)
            if info is None:
                continue
            if info.type not in _EXTENDED and (is_orphan or _names(previous, block)):
                is_orphan = False
                for _ in self.content(_member(self.offset, b"", info, _Changes())):
                    pass
                if self._cut is not None:
                    trailing_zeros, self._cut = 0, None
                    break
                continue
            self._put_back(block)
            return Gap(start, cause, False, True)
        self._has_ended = True
        return Gap(start, cause, trailing_zeros == 0, most_bytes >= _MIN_HEADER_BYTES)

    def _put_back(self, block: bytes) -> None:
        self._ahead = block
        self.offset -= len(block)


_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class _Changes:
    """What extended headers say about the member that follows them."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.is_sparse = False

    def take(self, kind: bytes, body: bytes) -> None:
        """
        Raises:
            ValueError: not what such a header holds.
        """
        if kind == tarfile.GNUTYPE_LONGNAME:
            name = body.partition(b"\0")[0]
            if not name:
                raise ValueError("an empty name")
            self.name = name.decode("utf-8", "surrogateescape")
        elif kind != tarfile.GNUTYPE_LONGLINK:
            records = _pax_records(body)
            if kind == tarfile.XGLTYPE:
                if b"path" in records or b"size" in records:
                    raise ValueError("one name or size for all members")
                return
            if b"path" in records:
                self.name = records[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
            if b"size" in records:
                self.size = int(records[b"size"])
                if self.size < 0:
                    raise ValueError(f"a size of {self.size}")
            self.is_sparse |= any(key.startswith(b"GNU.sparse.") for key in records)


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    records = {}
    place = 0
    while place < len(body):
        digits = body[place : place + 20].partition(b" ")[0]
        end = place + int(digits) if digits.isdigit() else 0
        key, equals, value = body[place + len(digits) + 1 : end - 1].partition(b"=")
        if end > len(body) or not equals or body[end - 1 : end] != b"\n":
            raise ValueError(f"no record at its byte {place}")
        records[key] = value
        place = end
    return records


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header that a block is, if its checksum is right."""
    if len(block) < _BLOCK or not block[148:156].strip(b"\0 "):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None


def _member(start: int, headers: bytes, info: tarfile.TarInfo, changes: _Changes) -> Member:
    name = info.name if changes.name is None else changes.name
    if info.isdir():
        return Member(start, headers, name, "directory", 0)
    # As tarfile and GNU tar: links and devices have no content, whatever their size says; unknown types have.
    has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    size = (info.size if changes.size is None else changes.size) if has_content else 0
    is_plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not changes.is_sparse
    return Member(start, headers, name, "file" if is_plain else "other", size)


def _names(block: bytes, header: bytes) -> bool:
    """``block`` is a long name's, pax's or GNU's, of the header that follows it."""
    return _PAX_RECORD.match(block) is not None or (header[99] != 0 and block[:100] == header[:100])


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
