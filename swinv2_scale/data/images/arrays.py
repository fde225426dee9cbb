"""Pixels beyond eight bits and three channels: ``.npy``, 16-bit PNG, TIFF. Sizes are checked before memory is taken."""

from __future__ import annotations

import io
import warnings
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's
_TYPES = ("uint8", "uint16", "float16", "float32", "float64")
_MOST_CHANNELS = 16  # of images with as many pixels as are allowed; smaller ones may have more


def check_size(width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        ValueError: what its header promises is above the limit.
    """
    if width * height > max_pixels:
        raise ValueError(
            f"its header says {width}x{height} = {width * height:,} pixels, data.max_image_pixels is {max_pixels:,}"
        )
    if width < 1 or height < 1:
        raise ValueError(f"its header says {width}x{height} pixels")


def read_npy(data: bytes, max_pixels: int) -> NDArray[Any]:
    """(H, W, C) as stored, from (H, W) or (H, W, C); never a pickle.

    Raises:
        ValueError: not such an array.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    _check_type(dtype)
    if len(shape) not in (2, 3):
        raise ValueError(f"its shape is {shape}, not (height, width) or (height, width, channels)")
    check_size(shape[1], shape[0], max_pixels)
    if len(data) - stream.tell() != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"it has {len(data) - stream.tell()} bytes after its header, {shape} {dtype} has others")
    return _as_pixels(np.load(io.BytesIO(data), allow_pickle=False))


def read_tiff(data: bytes, channels: int, max_pixels: int) -> NDArray[Any]:
    """(H, W, C) of the first page; of all pages where the model has so many channels and each page is one.

    Raises:
        ValueError: it would take more memory than the limit allows.
        ValueError: not such an image, or tifffile isn't installed.
    """
    try:
        import tifffile  # here alone: most jobs have none
    except ModuleNotFoundError:
        raise ValueError("this TIFF needs tifffile: pip install 'swinv2-scale[tiff]'") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        _check_page(page, max(channels, _MOST_CHANNELS), max_pixels)
        if page.samplesperpixel == 1 and channels not in (1, 3) and len(file.pages) == channels:
            pages = [file.pages[number] for number in range(channels)]
            if any(p.shape != page.shape or p.dtype != page.dtype for p in pages):
                raise ValueError("its pages differ in size or type")
            return _as_pixels(np.stack([p.asarray() for p in pages], -1))
        pixels = page.asarray()
        if page.samplesperpixel > 1 and pixels.shape[0] == page.samplesperpixel and page.planarconfig == 2:
            pixels = np.moveaxis(pixels, 0, -1)
        return _as_pixels(pixels)


def read_png_16(data: bytes) -> NDArray[np.uint16]:
    """(H, W, 1 or 3) with every bit, without alpha; Pillow keeps the upper eight of each colour."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ValueError("its 16 bits can't be read")
    if pixels.ndim == 2:
        return pixels[..., None]  # type: ignore[return-value]
    has_colour = data[25] in (2, 6)  # the header's colour type; 4 is grey with alpha
    return pixels[..., 2::-1] if has_colour else pixels[..., :1]  # type: ignore[return-value]


def as_type(pixels: NDArray[Any], pixel_type: str) -> NDArray[Any]:
    """Integers over their full range: >> 8, or times 257, or 0..1 in float32. Floats stay the values that they are.

    Raises:
        ValueError: floats, whose range nobody knows, where integers are asked.
    """
    if pixels.dtype == pixel_type:
        return pixels
    if np.issubdtype(pixels.dtype, np.floating):
        if pixel_type != "float32":
            raise ValueError(f"its values are {pixels.dtype}, data.pixel_type is {pixel_type}: set it to float32")
        return pixels.astype(np.float32)
    if pixel_type == "float32":
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    if pixel_type == "uint8":
        return (pixels >> 8).astype(np.uint8)
    return pixels.astype(np.uint16) * np.uint16(257)


def as_channels(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Grey becomes three equal colours, three colours their luma; other numbers must be the model's.

    Raises:
        ValueError: they aren't.
    """
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, 2)
    if (found, channels) == (3, 1):
        grey = (pixels.astype(np.float32) @ _LUMA)[..., None]
        return grey if pixels.dtype == np.float32 else np.rint(grey).astype(pixels.dtype)
    raise ValueError(f"it has {found} channels, the model reads {channels}")


def _check_page(page: Any, most_channels: int, max_pixels: int) -> None:
    width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
    check_size(width, height, max_pixels)
    if page.is_tiled:
        check_size(page.tilewidth, page.tilelength, max_pixels)  # a tile is unpacked whole, however small the image
    if page.imagedepth != 1 or page.tiledepth != 1:
        raise ValueError("it is a volume, not an image")
    if width * height * samples > max_pixels * most_channels:
        raise ValueError(
            f"its header says {samples} channels of {width}x{height} pixels, of {max_pixels:,} pixels "
            f"(data.max_image_pixels) {most_channels} are read"
        )
    _check_type(page.dtype)


def _check_type(dtype: np.dtype[Any] | None) -> None:
    if dtype is None or dtype.name not in _TYPES:
        raise ValueError(f"its values are {dtype}, images have {', '.join(_TYPES)}")


def _as_pixels(pixels: NDArray[Any]) -> NDArray[Any]:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if np.issubdtype(pixels.dtype, np.floating):
        # float64 beyond float32's range becomes inf, and is refused with the rest.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            pixels = pixels.astype(np.float32, copy=False)
        if not np.isfinite(pixels).all():
            raise ValueError("it has values that are not finite")
    return pixels
