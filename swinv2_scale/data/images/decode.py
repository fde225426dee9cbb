"""Bytes to pixels. An allow-list of image formats and nothing else: no byte of a shard is ever run."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.images.arrays import as_channels, as_type, check_size, read_npy, read_png_16, read_tiff
from swinv2_scale.data.images.fast_jpeg import decode_for, everyday_header
from swinv2_scale.data.images.orientation import orientation_of, stored_box, upright, upright_size
from swinv2_scale.data.images.resize import Box, resized_array, resized_fast, resized_image
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.errors import SampleError
from swinv2_scale.geometry import Size

#: File extension -> Pillow's name of the only format that it may hold; NPY is numpy's.
IMAGE_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "npy": "NPY",
}
#: May hold arrays that no image library has a type for.
_ARRAYS = ("TIFF", "NPY")
#: First bytes of files that are found under the wrong name.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\x93NUMPY": "NPY",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
}
_WEB_PAGE = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")


@dataclass(frozen=True)
class PixelFormat:
    """What a model wants of an image.

    Args:
        channels: 1 (grey), 3 (red, green, blue), or any number that .npy and TIFF files have.
        pixel_type: ``uint8``, ``uint16`` or ``float32``. Integers always span their type: 8 bits as uint16 are times
            257, 16 as uint8 >> 8, both as float32 0..1. Floating-point files are taken at their values.
        max_pixels: larger images are refused from their header; so are those above 179 million, Pillow's own limit.
        decoder: ``fast`` or ``exact``; both accept the same files.
    """

    channels: int
    pixel_type: str = "uint8"
    max_pixels: int = 89_478_485  # Pillow warns from there on
    decoder: str = "exact"


class Picture(Protocol):
    """An image whose header has been read."""

    @property
    def width(self) -> int:
        """Of the upright image, as ``height``."""

    @property
    def height(self) -> int: ...

    def resized(self, box: Box, size: Size, interpolation: str) -> NDArray[Any]:
        """The box (left, top, right, bottom; upright pixels) at ``size`` (height, width).

        Returns:
            (C, H, W) of the format's type, contiguous.

        Raises:
            SampleError: the image doesn't decode.
        """


def training_format(config: RunConfig) -> PixelFormat:
    data = config.data
    return PixelFormat(config.model.in_channels, data.pixel_type, data.max_image_pixels, data.decoder)


def evaluation_format(config: RunConfig) -> PixelFormat:
    """The reference decoder whatever training uses, so that losses of two runs compare."""
    return PixelFormat(config.model.in_channels, config.data.pixel_type, config.data.max_image_pixels, "exact")


def open_image(record: Record, wanted: PixelFormat) -> Picture:
    """The record's image, from its header alone.

    Raises:
        SampleError: no image, too large a one, or one that has no such header; names the sample and the cause.
    """
    extension = _image_file(record)
    # OpenCV's filters are for 8 bits; the others, rare and precious, take their time.
    is_plain = wanted.pixel_type == "uint8" and wanted.channels in (1, 3) and IMAGE_FORMATS[extension] not in _ARRAYS
    if wanted.decoder == "fast" and is_plain:
        return _FastPicture(record, extension, wanted)
    return _ExactPicture(record, extension, wanted)


def decode_image(record: Record) -> Image.Image:
    """The whole image, upright, as ``RGB``, to be looked at.

    Raises:
        SampleError: as ``open_image``; also floats and other numbers of channels, which nobody can look at.
    """
    pixels = _ExactPicture(record, _image_file(record), PixelFormat(channels=3)).pixels
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def decode_class(record: Record, num_classes: int | None) -> int:
    """The sample's class: its ``.cls`` file, an integer as text, or ``label`` in its ``.json``.

    Args:
        num_classes: None where any number from 0 on will do.

    Raises:
        SampleError: none, no integer, or out of range; names the sample and what was found.
    """
    if "cls" in record.files:
        where, text = "cls", record.files["cls"].decode("ascii", "replace").strip()
        label = int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else None
    elif "json" in record.files:
        where, text, label = "json", *_json_label(record.files["json"])
    else:
        raise SampleError(f"sample {record.name} has no label: it holds {_contents(record)}, labels are cls or json")
    if label is None:
        raise SampleError(f"sample {record.name}: the label in {where} is {text[:40]!r}, not an integer")
    if label < 0 or (num_classes is not None and label >= num_classes):
        most = "no class is negative" if num_classes is None else f"classes are 0 to {num_classes - 1}"
        raise SampleError(f"sample {record.name}: the label in {where} is {label}, {most}")
    return label


class _ExactPicture:
    """Pillow decodes and resizes: the reference."""

    def __init__(self, record: Record, extension: str, wanted: PixelFormat) -> None:
        self._sample = (record, extension)
        self._wanted = wanted
        self._stored, self.orientation = _stored(record, extension, wanted)
        stored = self._stored
        width, height = stored.size if isinstance(stored, Image.Image) else (stored.shape[1], stored.shape[0])
        self.width, self.height = upright_size(width, height, self.orientation)

    def resized(self, box: Box, size: Size, interpolation: str) -> NDArray[Any]:
        if isinstance(self.pixels, Image.Image):
            return resized_image(self.pixels, box, size, interpolation)
        return resized_array(self.pixels, box, size, interpolation)

    @cached_property
    def pixels(self) -> Image.Image | NDArray[Any]:
        """Upright, with the channels and of the type that are wanted: an 8-bit image, or (H, W, C)."""
        wanted = self._wanted
        with _refusing(*self._sample):
            decoded = _decoded(self._stored, *self._sample, wanted)
            if isinstance(decoded, Image.Image) and wanted.pixel_type == "uint8" and wanted.channels in (1, 3):
                eight_bits = decoded.convert("L" if wanted.channels == 1 else "RGB")
                if self.orientation == 1:
                    return eight_bits
                return Image.fromarray(upright(np.asarray(eight_bits), self.orientation))
            array = _as_array(decoded, wanted.channels) if isinstance(decoded, Image.Image) else decoded
            return upright(as_channels(as_type(array, wanted.pixel_type), wanted.channels), self.orientation)


class _FastPicture:
    """Everyday JPEGs at the scale that the box needs, the others decoded by Pillow; all resized by OpenCV."""

    def __init__(self, record: Record, extension: str, wanted: PixelFormat) -> None:
        self._sample = (record, extension)
        self._wanted = wanted
        data = record.files[extension]
        self._header = everyday_header(data) if IMAGE_FORMATS[extension] == "JPEG" else None
        header = self._header
        if header is None or header.has_note or header.width * header.height > _limit(wanted):
            exact = self._exact
            self.width, self.height, self._orientation = exact.width, exact.height, exact.orientation
        else:
            self.width, self.height, self._orientation = header.width, header.height, 1

    def resized(self, box: Box, size: Size, interpolation: str) -> NDArray[Any]:
        record, extension = self._sample
        if self._header is not None:
            turn, (height, width) = self._orientation, size
            stored = stored_box(box, self.width, self.height, turn)
            stored_size = upright_size(height, width, turn)
            fast = decode_for(record.files[extension], self._header, stored, stored_size, self._wanted.channels)
            if fast is not None:
                pixels = resized_fast(*fast, stored_size, interpolation)
                return np.ascontiguousarray(upright(pixels, turn, rows_axis=1))
        return resized_fast(np.asarray(self._exact.pixels), box, size, interpolation)

    @cached_property
    def _exact(self) -> _ExactPicture:
        """The verdict is Pillow's, so that the fast decoder accepts what the exact one does."""
        return _ExactPicture(*self._sample, self._wanted)


def _stored(record: Record, extension: str, wanted: PixelFormat) -> tuple[Image.Image | NDArray[Any], int]:
    """What the file holds, as little decoded as its format allows, and its EXIF orientation; its size is checked."""
    data = record.files[extension]
    with _refusing(record, extension):
        if extension == "npy":
            return read_npy(data, _limit(wanted)), 1
        try:
            image = _opened(data, extension)
        except UnidentifiedImageError:
            if IMAGE_FORMATS[extension] == "TIFF" and data[:2] in (b"II", b"MM"):
                return read_tiff(data, wanted.channels, _limit(wanted)), 1
            raise
        check_size(*image.size, _limit(wanted))
        if image.format == "TIFF" and _needs_tifffile(image, wanted):
            return read_tiff(data, wanted.channels, _limit(wanted)), int(image.getexif().get(274, 1))
        return image, orientation_of(image)


def _opened(data: bytes, extension: str) -> Image.Image:
    with warnings.catch_warnings():
        # About odd EXIF blocks, from every worker, and about sizes, which check_size refuses at our own limit.
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[extension]])


def _needs_tifffile(image: Image.Image, wanted: PixelFormat) -> bool:
    """Pillow drops bits of 16-bit colours, has no range for 32-bit pixels, and sees one page."""
    bits = max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
    keeps_all = bits <= 8 or image.mode.startswith("I;16")
    return (not keeps_all and (wanted.pixel_type != "uint8" or bits > 16)) or wanted.channels not in (1, 3)


def _decoded(
    stored: Image.Image | NDArray[Any], record: Record, extension: str, wanted: PixelFormat
) -> Image.Image | NDArray[Any]:
    """Pillow's image of 8 bits a channel, or an array where there are more."""
    if not isinstance(stored, Image.Image):
        return stored
    data = record.files[extension]
    stored.load()
    if stored.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        sixteen = np.asarray(stored).astype(np.uint16)
        return sixteen[..., None] if wanted.pixel_type != "uint8" else Image.fromarray((sixteen >> 8).astype(np.uint8))
    if stored.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels ({stored.mode}) have no known range")
    if extension == "png" and data[24] == 16 and wanted.pixel_type != "uint8":
        return read_png_16(data)
    return stored


def _as_array(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """(H, W, C): as many channels as wanted where the image has them, else grey or colours without alpha."""
    if image.mode in ("L", "RGB") or (image.mode in ("LA", "RGBA", "CMYK") and len(image.getbands()) == channels):
        pixels = np.asarray(image)
    else:
        pixels = np.asarray(image.convert("L" if image.mode in ("1", "LA") else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _limit(wanted: PixelFormat) -> int:
    # Pillow raises at twice its limit; the fast decoder must refuse the same files.
    return min(wanted.max_pixels, 2 * Image.MAX_IMAGE_PIXELS) if Image.MAX_IMAGE_PIXELS else wanted.max_pixels


def _image_file(record: Record) -> str:
    extension = next((name for name in record.files if name in IMAGE_FORMATS), None)
    if extension is None:
        raise SampleError(
            f"sample {record.name} has no image: it holds {_contents(record)}, images are {', '.join(IMAGE_FORMATS)}"
        )
    return extension


def _contents(record: Record) -> str:
    return ", ".join(record.files) or "nothing"


@contextmanager
def _refusing(record: Record, extension: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # sizes were checked: the node has too little, the sample is blameless
        raise
    except Exception as error:  # decoders raise a dozen types on damaged files; all mean the same here
        cause = cause_of(error, record.files[extension], IMAGE_FORMATS[extension])
        raise SampleError(f"sample {record.name}: {extension} doesn't decode: {cause}") from error


def cause_of(error: BaseException, data: bytes, wanted: str = "an image") -> str:
    """Why bytes don't decode as ``wanted`` (any format unless said), in words: what they are instead, if it's plain."""
    if not data:
        return "it is empty"
    if data.lstrip()[:20].lower().startswith(_WEB_PAGE):
        return f"it is an HTML page, not {wanted}"
    found = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    if found not in (None, wanted) and not (wanted == "an image" and found in IMAGE_FORMATS.values()):
        return f"it is {found}, not {wanted}"
    if isinstance(error, UnidentifiedImageError):
        return f"it doesn't start as {wanted} does, but with {data[:12]!r}"
    return str(error) or type(error).__name__


def _json_label(content: bytes) -> tuple[str, int | None]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return content[:40].decode("utf-8", "replace"), None
    label = parsed.get("label") if isinstance(parsed, dict) else None
    return repr(label), label if isinstance(label, int) and not isinstance(label, bool) else None
