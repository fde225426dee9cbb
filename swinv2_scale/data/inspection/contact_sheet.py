"""One picture of a data set: samples drawn from all of it, with their labels, masks and boxes."""

from __future__ import annotations

import colorsys
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from swinv2_scale.data.clips import VIDEO_EXTENSIONS, first_frame
from swinv2_scale.data.images.arrays import check_size
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, decode_image
from swinv2_scale.data.inspection.stats import class_names, drawn_samples, label_of, read_samples
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.indexing import shown
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.durable import write_whole
from swinv2_scale.errors import DataError, OutputError, SampleError

_CELL = 128  # px, of the square that a thumbnail fits into
_GAP, _MARGIN, _LINE = 10, 18, 15
_PAPER, _INK, _FAINT, _CELL_PAPER, _ALARM = "#ffffff", "#1a1a1a", "#757575", "#f1f1f1", "#b3261e"
_MASK_STRENGTH = 0.5
_MAX_BOXES = 20


def draw_contact_sheet(
    pattern: str, remote: RemoteFiles, index_dir: str, path: Path, *, rows: int = 6, columns: int = 10, seed: int = 0
) -> None:
    """Draw ``rows`` x ``columns`` samples, upright, with label and key; write a PNG (replaced).

    Masks (``seg.png``) are laid over, boxes (COCO's ``json``) drawn, clips shown by their first frame.

    Raises:
        DataError: no shards, no manifest, or a store doesn't answer.
        OutputError: the PNG can't be written.
    """
    shards = read_shard_set(pattern, remote, index_dir)
    if not shards.num_samples:
        raise DataError(f"{pattern!r} has no samples to draw")
    classes = class_names(shards, remote)
    numbers = drawn_samples(shards.num_samples, rows * columns, seed)
    rows = min(rows, -(-len(numbers) // columns))
    width = 2 * _MARGIN + columns * (_CELL + _GAP) - _GAP
    top = _MARGIN + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (width, top + rows * (_CELL + 2 * _LINE + _GAP) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title, detail = ImageFont.load_default(16), ImageFont.load_default(11)
    draw.text((_MARGIN, _MARGIN - 4), _cut(shown(pattern), title, width - 2 * _MARGIN), _INK, title)
    words = f"{len(numbers)} of {shards.num_samples:,} samples in {len(shards.locations):,} shards, seed {seed}"
    draw.text((_MARGIN, _MARGIN + _LINE + 3), words, _FAINT, detail)
    for place, record in enumerate(read_samples(shards, numbers, remote)):
        x = _MARGIN + place % columns * (_CELL + _GAP)
        y = top + place // columns * (_CELL + 2 * _LINE + _GAP)
        draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), _CELL_PAPER)
        label, key, colour = None, "can't be read", _ALARM
        if record is not None:
            label, key, colour = label_of(record, classes), _last_part(record.key), _INK
            try:
                picture = thumbnail(record)
                sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_CELL - picture.height) // 2))
            except SampleError as error:
                colour = _ALARM
                cause = error.message.removeprefix(f"sample {record.name}: ")
                draw.multiline_text((x + 6, y + 6), _wrapped(shown(cause), detail, _CELL - 12), _ALARM, detail)
        caption = key if label is None else shown(label if classes else f"class {label}")
        draw.text((x, y + _CELL + 2), _cut(caption, detail, _CELL), colour, detail)
        if label is not None:
            draw.text((x, y + _CELL + 2 + 13), _cut(key, detail, _CELL), _FAINT, detail)
    _save(sheet, path)


def thumbnail(record: Record) -> Image.Image:
    """RGB, at most 128 px each way, with what the sample says about its places.

    Small images are enlarged by whole numbers, pixel by pixel.

    Raises:
        SampleError: it has no image or clip, or one that doesn't decode.
    """
    image = _picture(record).convert("RGB")
    scale = _CELL / max(image.size)
    if scale >= 2:
        size = (image.width * int(scale), image.height * int(scale))
        small = image.resize(size, Image.Resampling.NEAREST)
    else:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        small = image.resize(size, Image.Resampling.LANCZOS)
    if "seg.png" in record.files:
        small = _with_mask(small, decode_mask(record))
    if "json" in record.files:
        _draw_boxes(small, record.files["json"], small.width / image.width, small.height / image.height)
    return small


def decode_mask(record: Record) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Class numbers (H, W) of the sample's ``seg.png``."""
    try:
        image = Image.open(io.BytesIO(record.files["seg.png"]), formats=["PNG"])
        check_size(*image.size, PixelFormat(channels=1).max_pixels)
        return np.asarray(image if image.mode in ("L", "P") else image.convert("L"), np.uint8)
    except Exception as error:  # Pillow raises a dozen types on damaged files; all mean the same here
        raise SampleError(f"sample {record.name}: seg.png doesn't decode: {error}") from error


def _picture(record: Record) -> Image.Image:
    clip = next((name for name in record.files if name in VIDEO_EXTENSIONS), None)
    if clip is None or any(name in IMAGE_FORMATS for name in record.files):
        return decode_image(record)
    try:
        frame: Image.Image = first_frame(record.files[clip])
    except ModuleNotFoundError as error:
        raise SampleError("clips need PyAV: pip install 'swinv2-scale[video]'") from error
    return frame


def _with_mask(image: Image.Image, mask: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    """Each class in a colour of its own, the same in every sheet; 0 (none) stays clear."""
    golden = 0.618034  # neighbours among class numbers get hues far apart
    palette = [colorsys.hsv_to_rgb(k * golden % 1, 0.85, 0.95 if k % 2 else 0.75) for k in range(256)]
    classes = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    colours = (np.array(palette) * 255)[classes]
    strength = np.where(classes[..., None] > 0, _MASK_STRENGTH, 0.0)
    mixed = np.asarray(image) * (1 - strength) + colours * strength
    return Image.fromarray(mixed.round().astype(np.uint8))


def _draw_boxes(image: Image.Image, data: bytes, x_scale: float, y_scale: float) -> None:
    """COCO's: ``annotations[].bbox`` is x, y, width, height in px. Other JSON is left alone."""
    draw = ImageDraw.Draw(image)
    for category, box in _boxes(data)[:_MAX_BOXES]:
        hue = category * 0.618034 % 1
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 1.0))
        x, y, w, h = box
        corners = [x * x_scale, y * y_scale, max(x + w, x + 1) * x_scale, max(y + h, y + 1) * y_scale]
        draw.rectangle([min(max(c, 0), 10 * _CELL) for c in corners], outline=colour)


def _boxes(data: bytes) -> list[tuple[int, list[float]]]:
    try:
        parsed = json.loads(data)
        found = [(int(a["category_id"]) % 2**16, [float(v) for v in a["bbox"]]) for a in parsed["annotations"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return []
    return [(k, box) for k, box in found if len(box) == 4 and all(map(math.isfinite, box)) and min(box[2:]) >= 0]


def _last_part(key: str) -> str:
    return shown(key.rpartition("/")[2])


def _cut(text: str, font: Any, width: int) -> str:
    """As much as fits; the end of a key tells more than its beginning."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(".." + text) > width:
        text = text[1:]
    return ".." + text


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(_cut(line, font, width) for line in lines[:8] if line)


def _save(sheet: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
