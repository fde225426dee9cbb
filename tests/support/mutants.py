"""Shards with one thing wrong each, and which samples that costs."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from swinv2_scale.data.shards.manifest import INDEX_ENTRY
from swinv2_scale.data.shards.writer import RawSample, write_shards
from tests.support.pictures import encoded

NUM_SHARDS, SHARD_SAMPLES = 3, 16
NUM_SAMPLES = NUM_SHARDS * SHARD_SAMPLES
#: What a pickle in a shard would make, if anything opened it.
CANARY = Path(tempfile.gettempdir()) / f"swinv2-scale-canary-{os.getpid()}"
#: What most mutants hit: (shard, sample).
HIT = (1, 5)
_AFTER_CUT = frozenset((1, sample) for sample in range(9, SHARD_SAMPLES))
_SHARD = frozenset((1, sample) for sample in range(SHARD_SAMPLES))


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        files: what HIT holds instead of its JPEG and class, when the shards are written.
        spoil: what happens to the folder after that, manifest and indexes being there already.
        lost: samples that can't be trained on.
        is_seen_by_size: the job sees at its start that a file isn't as its manifest says.
        only_for_labels: SimMIM doesn't mind.
    """

    name: str
    files: Callable[[], dict[str, bytes]] | None = None
    spoil: Callable[[Path], None] | None = None
    lost: frozenset[tuple[int, int]] = field(default=frozenset())
    is_seen_by_size: bool = False
    only_for_labels: bool = False


def photograph(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Smooth noise, like a photograph's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def write_mutant(folder: Path, mutant: Mutant) -> Path:
    """Three shards of 16 photographs, one thing wrong with them."""
    schema = {"classes": ["a", "b", "c"]}
    write_shards(_samples(mutant), folder, samples_per_shard=SHARD_SAMPLES, made_by="mutants", schema=schema)
    if mutant.spoil:
        mutant.spoil(folder)
    return folder


def _samples(mutant: Mutant) -> Iterator[RawSample]:
    for number in range(NUM_SAMPLES):
        files = {"jpg": encoded(photograph(number)), "cls": str(number % 3).encode()}
        if mutant.files and divmod(number, SHARD_SAMPLES) == HIT:
            files = mutant.files()
        yield {"__key__": f"{number:06d}", **files}


def _offset(folder: Path, sample: int) -> int:
    """Where a sample of the second shard begins."""
    index = (folder / "000001.tar.index").read_bytes()
    return int(INDEX_ENTRY.unpack_from(index, sample * INDEX_ENTRY.size)[0])


def _cut(sample: int, more: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tar = folder / "000001.tar"
        tar.write_bytes(tar.read_bytes()[: _offset(folder, sample) + more])

    return spoil


def _overwrite(
    name: str, place: Callable[[Path], int], change: Callable[[bytes], bytes], length: int
) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path, start = folder / name, place(folder)
        data = bytearray(path.read_bytes())
        data[start : start + length] = change(bytes(data[start : start + length]))
        path.write_bytes(data)

    return spoil


def _in_tar(more: int, length: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return _overwrite("000001.tar", lambda folder: _offset(folder, HIT[1]) + more, change, length)


def _flip(data: bytes) -> bytes:
    return bytes(byte ^ 4 for byte in data)


def _zero(data: bytes) -> bytes:
    return bytes(len(data))


def _remove_end_blocks(folder: Path) -> None:
    tar = folder / "000001.tar"
    offset, length, _ = INDEX_ENTRY.unpack_from((folder / "000001.tar.index").read_bytes(), 15 * INDEX_ENTRY.size)
    tar.write_bytes(tar.read_bytes()[: offset + length])


def _with_class(data: bytes, extension: str = "jpg") -> Callable[[], dict[str, bytes]]:
    return lambda: {extension: data, "cls": b"1"}


class _Canary:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (CANARY,)


def _pickles() -> dict[str, bytes]:
    bad = pickle.dumps(_Canary())
    return {
        "jpg": encoded(photograph(21)),
        "cls": b"1",
        "pyd": bad,
        "pkl": bad,
        "meta.pickle": bad,
        "pth": bad,
        "npz": bad,
    }


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(photograph(21), exif=exif)


def _animated() -> bytes:
    frames = [photograph(seed) for seed in range(3)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def _sixteen_bits() -> bytes:
    values = np.arange(40 * 32, dtype=np.uint16).reshape(32, 40) * 51
    return encoded(Image.fromarray(values), "PNG")


ONE = frozenset({HIT})
_JPEG = encoded(photograph(21))
MUTANTS = [
    Mutant("nothing"),
    # The tar, after its manifest was made.
    Mutant("tar cut inside a header", spoil=_cut(9, 200), lost=_AFTER_CUT, is_seen_by_size=True),
    Mutant("tar cut inside an image", spoil=_cut(9, 700), lost=_AFTER_CUT, is_seen_by_size=True),
    Mutant("tar cut between samples", spoil=_cut(9, 0), lost=_AFTER_CUT, is_seen_by_size=True),
    Mutant("tar without its end blocks", spoil=_remove_end_blocks, is_seen_by_size=True),
    Mutant("one flipped bit in a header", spoil=_in_tar(10, 1, _flip), lost=ONE),
    Mutant("one flipped bit in an image", spoil=_in_tar(900, 1, _flip), lost=ONE),
    Mutant("a zeroed block that was a header", spoil=_in_tar(0, 512, _zero), lost=ONE),
    Mutant("a zeroed block inside an image", spoil=_in_tar(512, 512, _zero), lost=ONE),
    Mutant(
        "a shard that is another one's copy",
        spoil=lambda folder: shutil.copy(folder / "000002.tar", folder / "000001.tar") and None,
        lost=_SHARD,
    ),
    Mutant("a missing shard", spoil=lambda f: (f / "000001.tar").unlink(), lost=_SHARD, is_seen_by_size=True),
    Mutant(
        "one flipped bit in an index",
        spoil=_overwrite("000001.tar.index", lambda _: HIT[1] * INDEX_ENTRY.size + 1, _flip, 1),
        lost=ONE,
    ),
    Mutant(
        "a cut index",
        spoil=lambda f: (
            (f / "000001.tar.index").write_bytes((f / "000001.tar.index").read_bytes()[: 9 * 24 + 7]) and None
        ),
        lost=_AFTER_CUT,
        is_seen_by_size=True,
    ),
    # Images that were like this when the shard was written.
    Mutant("truncated JPEG", _with_class(_JPEG[: len(_JPEG) // 2]), lost=ONE),
    Mutant("empty image", _with_class(b""), lost=ONE),
    Mutant("HTML instead of a JPEG", _with_class(b"<!DOCTYPE html><html>404 Not Found</html>"), lost=ONE),
    Mutant("PNG named .jpg", _with_class(encoded(photograph(21), "PNG")), lost=ONE),
    Mutant("decompression bomb", _with_class(encoded(Image.new("1", (20_000, 20_000)), "PNG"), "png"), lost=ONE),
    Mutant("no image", lambda: {"cls": b"1", "txt": b"a photograph"}, lost=ONE),
    Mutant("CMYK JPEG", _with_class(encoded(photograph(21, "CMYK")))),
    Mutant("16-bit PNG", _with_class(_sixteen_bits(), "png")),
    Mutant("palette PNG with transparency", _with_class(encoded(photograph(21, "P"), "PNG", transparency=3), "png")),
    Mutant("animated WebP", _with_class(_animated(), "webp")),
    Mutant("JPEG turned by its EXIF note", _with_class(_exif(6))),
    Mutant("image of 1x1", _with_class(encoded(photograph(21, size=(1, 1)), "PNG"), "png")),
    Mutant("pickles beside the image", _pickles),
    Mutant("no label", lambda: {"jpg": _JPEG}, only_for_labels=True),
    Mutant("label out of range", lambda: {"jpg": _JPEG, "cls": b"3"}, only_for_labels=True),
    Mutant("label that is no number", lambda: {"jpg": _JPEG, "cls": b"cat"}, only_for_labels=True),
]
