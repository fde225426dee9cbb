"""Whether the files of a sample hold what their names say."""

from __future__ import annotations

import json

from swinv2_scale.data.clips import VIDEO_EXTENSIONS, count_frames
from swinv2_scale.data.images.arrays import read_npy, read_tiff
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, decode_class, decode_image
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.errors import SampleError

_MAX_PIXELS = PixelFormat(channels=3).max_pixels


def problems_of(key: str, files: dict[str, bytes], num_classes: int | None) -> tuple[list[str], set[str]]:
    """(what is wrong with a sample's files, extensions of files that nobody here can decode).

    Images, masks, arrays and clips are decoded whole, labels must be integers below ``num_classes``, JSON must parse.
    """
    problems: list[str] = []
    undecoded: set[str] = set()
    sizes: dict[str, tuple[int, int]] = {}
    for extension, data in files.items():
        kind = extension.rpartition(".")[2]
        try:
            if kind in IMAGE_FORMATS:
                sizes[extension] = _decoded_size(key, kind, data)
            elif kind in VIDEO_EXTENSIONS:
                count_frames(data)
            elif extension == "cls":
                decode_class(Record("", key, {"cls": data}), num_classes)
            elif kind == "json":
                json.loads(data)
            else:
                undecoded.add(extension)
        except ModuleNotFoundError:
            undecoded.add(extension)
        except SampleError as error:
            cause = error.message.removeprefix(f"sample {key}: ")
            problems.append(cause if cause.startswith(kind) else f"{extension}: {cause}")
        except Exception as error:  # decoders raise a dozen types on damaged files; all mean the same here
            problems.append(f"{extension}: {error or type(error).__name__}")
    mask = sizes.get("seg.png")
    image = next((size for extension, size in sizes.items() if extension in IMAGE_FORMATS), None)
    if mask is not None and image is not None and mask != image:
        problems.append(f"the mask is {mask[0]}x{mask[1]}, its image {image[0]}x{image[1]}")
    return problems, undecoded


def _decoded_size(key: str, kind: str, data: bytes) -> tuple[int, int]:
    """(width, height) of an image that was decoded whole, as a person sees it."""
    if kind == "npy":
        height, width = read_npy(data, _MAX_PIXELS).shape[:2]
        return width, height
    try:
        return decode_image(Record("", key, {kind: data})).size
    except SampleError:
        if IMAGE_FORMATS[kind] != "TIFF":
            raise
        height, width = read_tiff(data, 3, _MAX_PIXELS).shape[:2]  # floats, or more channels than Pillow knows
        return width, height
