"""From the files of a source to a sample's part of a tar: read, decoded to see that they are whole, made smaller."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from swinv2_scale.data.clips import VIDEO_EXTENSIONS, count_frames
from swinv2_scale.data.images.arrays import check_size, read_npy, read_tiff
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, cause_of, decode_image
from swinv2_scale.data.images.orientation import orientation_of, upright_size
from swinv2_scale.data.shards.manifest import MAX_SAMPLE_BYTES
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.data.shards.writer import RawSample, tar_block
from swinv2_scale.data.sources.listing import Item, extension_of
from swinv2_scale.durable import open_plain
from swinv2_scale.errors import ConfigError, DataError, SampleError

#: Pillow's format -> the extension that its files get here; MPO is a JPEG with a second one behind it.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tiff"}
_FORMATS = sorted(set(IMAGE_FORMATS.values()) - {"NPY"})
_MAX_PIXELS = PixelFormat(channels=3).max_pixels


@dataclass(frozen=True)
class Treatment:
    """What is done to each image.

    Attributes:
        verify: decode it whole.
        short_side: larger ones are made smaller, to so many px; None: files keep their bytes.
        quality: of the JPEGs that this makes.
    """

    verify: bool = True
    short_side: int | None = None
    quality: int = 92


@dataclass(frozen=True)
class Rejected:
    """A file that is damaged, and how."""

    path: str
    cause: str


def prepare(item: Item, root: Path, treatment: Treatment, max_mask_value: int) -> bytes | Rejected:
    """The sample's part of a tar.

    Args:
        max_mask_value: larger values make a mask a damaged one.

    Raises:
        DataError: a file is gone or can't be read, or a package is missing.
        ConfigError: a clip or array is to be made smaller.
    """
    sample: RawSample = {"__key__": item.key}
    if item.label is not None:
        sample["cls"] = str(item.label).encode()
    if item.json is not None:
        sample["json"] = item.json
    size = (0, 0)
    for number, path in enumerate(item.files):
        try:
            with open_plain(root / path) as file:
                data = file.read()
        except OSError as error:
            raise DataError(f"cannot read {root / path}: {error}") from error
        try:
            if number == 1:
                sample["seg.png"] = _mask(data, size, treatment, max_mask_value)
                continue
            extension, sample_bytes, size = _main_file(data, extension_of(path), treatment)
            sample[extension] = sample_bytes
        except SampleError as error:
            return Rejected(path, error.message)
    block = tar_block(sample)
    if len(block) > MAX_SAMPLE_BYTES:
        return Rejected(item.files[0], f"has {len(block)} bytes; readers take samples of up to {MAX_SAMPLE_BYTES}")
    return block


def _main_file(data: bytes, extension: str, treatment: Treatment) -> tuple[str, bytes, tuple[int, int]]:
    """(extension, bytes, width and height in the sight of a person) of an image, clip or array."""
    if extension in VIDEO_EXTENSIONS or extension == "npy":
        if treatment.short_side is not None:
            raise ConfigError(f"--short-side is for images, there is a .{extension}", "leave it out")
        if treatment.verify:
            (_check_array if extension == "npy" else _check_clip)(data)
        return extension, data, (0, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF blocks, from every worker
            return _image(data, treatment)
    except Exception as error:  # Pillow raises a dozen types on damaged files; all mean the same here
        raise _undecodable(error.__cause__ or error, data) from error


def _image(data: bytes, treatment: Treatment) -> tuple[str, bytes, tuple[int, int]]:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if data[:2] not in (b"II", b"MM") or treatment.short_side is not None:
            raise
        height, width, _ = read_tiff(data, 3, _MAX_PIXELS).shape  # more channels than Pillow knows
        return "tiff", data, (width, height)
    check_size(*image.size, _MAX_PIXELS)
    # By content: one file of ImageNet's train/*.JPEG (n02105855_2933) is a PNG, which a reader of .jpg would refuse.
    extension = _EXTENSIONS.get(str(image.format), str(image.format).lower())
    orientation = orientation_of(image)
    size = upright_size(*image.size, orientation)
    if treatment.verify:
        _check_whole(image, data)
    # A second generation of JPEG would lose quality for nothing.
    is_fine = extension == "jpg" and orientation == 1 and image.mode in ("L", "RGB") and _fits(size, treatment)
    if treatment.short_side is None or is_fine:
        return extension, data, size
    pixels = decode_image(Record("", "", {extension: data}))
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I;16"):
        pixels = pixels.convert("L")
    buffer = io.BytesIO()
    small = pixels.resize(_smaller(size, treatment), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=treatment.quality)
    return "jpg", buffer.getvalue(), size


def _check_whole(image: Image.Image, data: bytes) -> None:
    image.load()
    if image.format == "PNG":
        # Decoding skips the checksums, and takes a file without its end.
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()


def _fits(size: tuple[int, int], treatment: Treatment) -> bool:
    return treatment.short_side is None or min(size) <= treatment.short_side


def _smaller(size: tuple[int, int], treatment: Treatment) -> tuple[int, int]:
    """The size with the short side asked for; never larger than it is."""
    if treatment.short_side is None or _fits(size, treatment):
        return size
    width, height = (max(round(side * treatment.short_side / min(size)), 1) for side in size)
    return width, height


def _mask(data: bytes, size: tuple[int, int], treatment: Treatment, max_value: int) -> bytes:
    """A PNG of class numbers, checked against its image's size and made smaller with it."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=["PNG"])
        if treatment.verify:
            _check_whole(image, data)
        # Of a palette image the numbers, not the colours.
        values = Image.frombytes("L", image.size, image.tobytes()) if image.mode in ("L", "P") else None
    except Exception as error:  # as for images
        raise _undecodable(error, data, "PNG") from error
    if values is None:
        raise SampleError(f"a mask has one number of 8 bits a pixel, this has Pillow's mode {image.mode}")
    if image.size != size:
        raise SampleError(f"the mask is {image.size[0]}x{image.size[1]}, its image {size[0]}x{size[1]}")
    if treatment.verify and (largest := int(np.asarray(values).max())) > max_value:
        raise SampleError(f"the mask has the value {largest}; classes go up to {max_value}")
    if _fits(size, treatment):
        return data
    buffer = io.BytesIO()
    values.resize(_smaller(size, treatment), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _check_array(data: bytes) -> None:
    try:
        read_npy(data, _MAX_PIXELS)
    except Exception as error:  # numpy raises several types on damaged headers
        raise _undecodable(error, data, "NPY") from error


def _check_clip(data: bytes) -> None:
    try:
        count_frames(data)
    except ModuleNotFoundError as error:
        raise DataError("verifying clips needs PyAV", "pip install 'swinv2-scale[video]', or --no-verify") from error


def _undecodable(error: BaseException, data: bytes, wanted: str = "an image") -> SampleError:
    return SampleError(f"doesn't decode: {cause_of(error, data, wanted)}")
