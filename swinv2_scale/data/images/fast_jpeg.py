"""Everyday JPEGs, decoded at the scale that a crop needs. Whatever is unusual about one is left to Pillow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from swinv2_scale.data.images.resize import Box
from swinv2_scale.geometry import Size

_SOI, _SOS, _DQT, _DHT, _DRI, _COM, _APP0, _APP1, _APP2 = 0xD8, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE, 0xE0, 0xE1, 0xE2
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
#: Eighths of the size at which libjpeg-turbo's inverse DCT is vectorised: 3, 5, 6 and 7 eighths cost more than the next
#: larger one of these (500x375, quality 95: 8/8 950 us, 7/8 1780, 5/8 1290, 4/8 870, 3/8 780, 2/8 650).
_EIGHTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class JpegHeader:
    """What the segments before the first scan say."""

    width: int
    height: int
    has_note: bool  # EXIF or XMP, which may say that the image isn't upright


def everyday_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG that every decoder reads alike: 8 bits, grey or three components; None for any other."""
    if len(data) < 4 or data[0] != 0xFF or data[1] != _SOI:
        return None
    width = height = 0
    has_note = False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            frame = data[at + 4 : at + 2 + length]
            if width or len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
                return None
            height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
        elif marker == _SOS:
            return JpegHeader(width, height, has_note) if width and height else None
        elif marker == _DQT:
            is_cut = at + 2 + length > len(data)
            if is_cut or (length - 2) % 65 or any(data[at + 4 + table] >> 4 for table in range(0, length - 2, 65)):
                return None  # 16-bit tables, or a damaged one
        elif marker == _APP1:
            has_note = True
        elif marker == _APP2 and data[at + 4 : at + 7] == b"MPF":
            return None  # several pictures
        elif not (_APP0 <= marker <= _APP0 + 15 or marker in (_DHT, _DRI, _COM)):
            return None
        at += 2 + length
        if length < 2 or at > len(data):
            return None
    return None


def decode_for(
    data: bytes, header: JpegHeader, box: Box, size: Size, channels: int
) -> tuple[NDArray[np.uint8], Box] | None:
    """The image at the smallest fast scale at which the box still has ``size`` pixels, or in full.

    Args:
        box: in stored pixels.
        size: (height, width) that the box will be resized to, as stored.

    Returns:
        uint8 (h, w, 3) or (h, w), and the box in it; None where the decoder has the least doubt about the bytes.
    """
    fits = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    eighths = next((n for n in _EIGHTHS if n * fits >= 8), 8)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if channels == 1 else "RGB",
            # Colours that are not smoothed save 3 to 6% and cost 0.1 of 255 levels where they are averaged afterwards.
            # Its fast DCT would save 2% and cost 0.5.
            fastupsample=fits > 1,
            min_height=-(-header.height * eighths // 8),
            min_width=-(-header.width * eighths // 8),
        )
    except ValueError:
        return None
    share = eighths / 8
    return pixels if channels != 1 else pixels[..., 0], (box[0] * share, box[1] * share, box[2] * share, box[3] * share)
