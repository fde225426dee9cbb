"""Pictures of what a classifier does: images with their labels, and which classes it takes for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_RIGHT, _WRONG, _INK, _GREY = "#2f7d32", "#c62828", "#202020", "#808080"
_GAP, _HEAD, _LINE = 8, 28, 19
_MOST_NAMED = 40  # classes whose names fit beside a matrix
_MOST_NUMBERED = 20  # classes whose shares fit into its cells
_MOST_LISTED = 12


def shown(images: Tensor, normalised: Tensor) -> Tensor:
    """Pixels as uint8 (B, 1 or 3, H, W): 8-bit ones as they are, others around mid-grey; of more channels the first.

    Args:
        images: (B, C, H, W) of any pixel type.
        normalised: the same, of about zero mean and unit variance.
    """
    if images.shape[1] not in (1, 3):
        images, normalised = images[:, :1], normalised[:, :1]
    if images.element_size() == 1:
        return images
    return ((0.5 + normalised / 6).clamp(0, 1) * 255).round().byte()


def draw_gallery(images: Tensor, captions: Sequence[tuple[str, str, bool]], title: str) -> Image.Image:
    """Images in rows of at most four, each above its label and, green or red, what it was taken for.

    Args:
        images: uint8 (B, 1 or 3, H, W).
        captions: (label, prediction, whether they agree) of each.
    """
    count, _, height, width = images.shape
    zoom = max(1, 160 // max(height, width))
    cell_w, cell_h = max(width * zoom, 160), height * zoom + 40
    columns = min(count, 4)
    rows = -(-count // columns)
    size = (columns * (cell_w + _GAP) + _GAP, _HEAD + rows * (cell_h + _GAP))
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), _font(13)
    pen.text((_GAP, 6), _cut(title, size[0] - 2 * _GAP, font), fill=_INK, font=font)
    for number, (label, guess, is_right) in enumerate(captions):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (cell_w + _GAP), _HEAD + row * (cell_h + _GAP)
        pixels = images[number].expand(3, height, width).permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        picture.paste(image, (x, y))
        colour = _RIGHT if is_right else _WRONG
        pen.rectangle((x - 1, y - 1, x + width * zoom, y + height * zoom), outline=colour)
        pen.text((x, y + height * zoom + 3), _cut(label, cell_w, font), fill=_INK, font=font)
        pen.text((x, y + height * zoom + 20), _cut(guess, cell_w, font), fill=colour, font=font)
    return picture


def draw_confusion(matrix: NDArray[np.float64], names: Sequence[str], title: str) -> Image.Image:
    """A square of how often each class (row) was taken for each (column), and the most frequent mistakes in words.

    Args:
        matrix: (K, K) counts; rows are labels.
    """
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cell = max(1, min(44, 900 // count))
    font = _font(13)
    is_named = count <= _MOST_NAMED
    left = _GAP + (max(int(font.getlength(_cut(name, 140, font))) for name in names) + _GAP if is_named else 16)
    top = _HEAD + 20 + (left if is_named else 0)
    side = cell * count
    size = (left + side + 3 * _GAP + 380, top + max(side, _LINE * (_MOST_LISTED + 1)) + _GAP)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((_GAP, 6), _cut(title, size[0] - 2 * _GAP, font), fill=_INK, font=font)
    pen.text((_GAP, _HEAD), "row: label, column: what it was taken for", fill=_GREY, font=font)
    pixels = np.repeat(np.repeat(_coloured(shares), cell, 0), cell, 1)
    picture.paste(Image.fromarray(pixels), (left, top))
    pen.rectangle((left - 1, top - 1, left + side, top + side), outline=_GREY)
    if is_named:
        for number, name in enumerate(names):
            text, middle = _cut(name, 140, font), number * cell + cell // 2
            pen.text((left - _GAP, top + middle), text, fill=_INK, font=font, anchor="rm")
            _write_upwards(picture, text, (left + middle, top - _GAP), font)
    if count <= _MOST_NUMBERED:
        small = _font(12)
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = float(shares[row, column])
            colour = "white" if share > 0.5 else _INK
            place = (left + column * cell + cell // 2, top + row * cell + cell // 2)
            pen.text(place, f"{share:.0%}", fill=colour, font=small, anchor="mm")
    _list_mistakes(pen, matrix, names, (left + side + 2 * _GAP, top))
    return picture


def _list_mistakes(
    pen: ImageDraw.ImageDraw, matrix: NDArray[np.float64], names: Sequence[str], place: tuple[int, int]
) -> None:
    wrong = matrix - np.diag(matrix.diagonal())
    totals = np.maximum(matrix.sum(1), 1)
    font, (x, y) = _font(13), place
    lines = []
    for flat in np.argsort(-wrong, axis=None, kind="stable")[:_MOST_LISTED]:
        row, column = divmod(int(flat), len(matrix))
        if wrong[row, column]:
            share = wrong[row, column] / totals[row]
            lines.append(f"{_cut(names[row], 140, font)} taken for {_cut(names[column], 140, font)}: {share:.0%}")
    pen.text((x, y), "most frequent mistakes" if lines else "no mistakes", fill=_GREY, font=font)
    for number, line in enumerate(lines, 1):
        pen.text((x, y + _LINE * number), line, fill=_INK, font=font)


def _coloured(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Blue on the diagonal, red beside it, both darker with the share; mistakes are seen from one in a hundred on."""
    strength = np.where(np.eye(len(shares), dtype=bool), shares, np.sqrt(shares))[..., None]
    ends = np.where(np.eye(len(shares), dtype=bool)[..., None], (21, 101, 192), (198, 40, 40))
    return np.asarray(np.rint(255 + strength * (ends - 255)), np.uint8)


def _write_upwards(picture: Image.Image, text: str, foot: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    """Text that reads upwards and ends above a point."""
    width, height = int(font.getlength(text)) + 1, 18
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, height // 2), text, fill=_INK, font=font, anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (foot[0] - height // 2, foot[1] - width))


def _cut(text: str, most: int, font: ImageFont.FreeTypeFont) -> str:
    text = "".join(char if char.isprintable() else "?" for char in text[:200])
    if font.getlength(text) <= most:
        return text
    while text and font.getlength(text + "…") > most:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels carry one
    return font
