"""Whether the files of a sample hold what their names say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from swinv2_scale.data.images.arrays import read_npy, read_tiff
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, cause_of, decode_class, decode_image
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.data.sources.listing import VIDEO_EXTENSIONS
from swinv2_scale.errors import SampleError

#: ffmpeg's names of what VIDEO_EXTENSIONS are. It knows playlists too, and would open the files that they name.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
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


def count_frames(data: bytes) -> int:
    """Decode a clip to its end.

    Raises:
        ModuleNotFoundError: PyAV isn't installed.
        SampleError: it ends early, or can't be decoded.
    """
    frames = _frames(data)
    declared: int = next(frames)
    found = sum(1 for _ in frames)
    if found < max(declared, 1):
        raise SampleError(f"the clip ends after {found} of {declared} frames")
    return found


def first_frame(data: bytes) -> Any:
    """The first picture of a clip (a PIL image). Raises as ``count_frames``."""
    frames = _frames(data)
    next(frames)
    frame = next(frames, None)
    if frame is None:
        raise SampleError("the clip has no frame")
    return frame.to_image()


def _frames(data: bytes) -> Iterator[Any]:
    """How many frames a clip says it has (0: it doesn't say), then the frames."""
    import av

    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": _CONTAINERS}) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1
            yield stream.frames
            yield from container.decode(stream)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise SampleError(f"the clip doesn't decode: {cause_of(error, data, 'a clip')}") from error
