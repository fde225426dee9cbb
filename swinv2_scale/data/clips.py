"""Clips, decoded by PyAV (extra "video") to see that they are whole, or for their first picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from swinv2_scale.data.images.decode import cause_of
from swinv2_scale.errors import SampleError

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov")
#: ffmpeg's names of these. It takes lists of files for clips too, and would open the files that they name.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


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
