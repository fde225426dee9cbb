"""Classify image files with anyone's weights: the likeliest classes, and a picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from swinv2_scale.config.tasks import CropRule
from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, decode_image, open_image
from swinv2_scale.data.images.transforms import evaluation_crop
from swinv2_scale.data.shards.labels import read_class_names
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.durable import open_plain
from swinv2_scale.errors import ConfigError, DataError, OutputError
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.weights.api import load_into, require_head
from swinv2_scale.weights.read import Weights

_MOST_DRAWN = 100
_THUMBNAIL, _ROW, _GAP, _TEXT_WIDTH = 160, 22, 12, 420


@dataclass(frozen=True)
class Prediction:
    """One image and its likeliest classes, best first."""

    path: Path
    thumbnail: Image.Image
    top: tuple[tuple[str, float], ...]  # (class name, probability)


class Classifier:
    """A model with its weights, its image size and its class names, as its file says them.

    Args:
        labels: a file of class names, one a line; else those of the weights, else numbers.
        fields: of ModelConfig, where the weights don't say them: image_size, window_size, ..

    Raises:
        WeightsError: no class head, or no Swin V2.
        ConfigError: the names don't fit the classes.
    """

    def __init__(self, weights: Weights, labels: Path | None = None, **fields: Any) -> None:
        require_head(weights)
        config = weights.config(**fields)
        if config.in_channels not in (1, 3):
            raise ConfigError(
                f"{weights.where} reads {config.in_channels} channels; images have 1 (grey) or 3 (colour)"
            )
        self.names = _class_names(labels, weights.facts.labels, config.num_classes)
        self.model = SwinV2(config).eval()
        load_into(self.model, weights)
        #: ImageNet's usual one where the weights don't say.
        self._crop = weights.facts.crop or CropRule()
        mean, std = weights.facts.normalisation(config.in_channels)
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    @torch.inference_mode()
    def predict(self, path: Path, top_k: int) -> Prediction:
        """The likeliest classes of one image: its centre, at the model's size.

        Raises:
            DataError: it can't be read as an image.
        """
        config = self.model.config
        try:
            with open_plain(path) as file:
                content = file.read()
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error}", "check the path") from None
        record = Record(str(path), str(path), {path.suffix.lower().lstrip("."): content})
        picture = open_image(record, PixelFormat(config.in_channels))
        pixels = torch.tensor(evaluation_crop(picture, config.image_shape, *self._crop))
        logits = self.model(((pixels / 255 - self._mean) / self._std)[None])[0]
        best = logits.softmax(-1).topk(min(top_k, len(self.names)))
        top = tuple((self.names[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True))
        thumbnail = decode_image(record)
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
        return Prediction(path, thumbnail, top)


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, sorted.

    Raises:
        DataError: nothing there, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.glob("*") if p.suffix.lower().lstrip(".") in IMAGE_FORMATS)
        if not path.exists() or (path.is_dir() and not inside):
            problem = "holds no images" if path.exists() else "doesn't exist"
            raise DataError(f"{path} {problem}", f"images end with one of {', '.join(IMAGE_FORMATS)}")
        found += inside if path.is_dir() else [path]
    return found


def draw_predictions(predictions: list[Prediction], path: Path) -> None:
    """Each image with a bar for each of its classes, one below the other, as a PNG; the first hundred.

    Raises:
        OutputError: it can't be written.
    """
    predictions = predictions[:_MOST_DRAWN]
    heights = [max(p.thumbnail.height, len(p.top) * _ROW) + _GAP for p in predictions]
    picture = Image.new("RGB", (_THUMBNAIL + _TEXT_WIDTH + 3 * _GAP, sum(heights) + _GAP), "white")
    pen = ImageDraw.Draw(picture)
    y = _GAP
    for prediction, height in zip(predictions, heights, strict=True):
        thumbnail = prediction.thumbnail
        picture.paste(thumbnail, (_GAP + (_THUMBNAIL - thumbnail.width) // 2, y))
        for number, (name, probability) in enumerate(prediction.top):
            left, top = _THUMBNAIL + 2 * _GAP, y + number * _ROW
            pen.rectangle((left, top, left + max(1, round(_TEXT_WIDTH * probability)), top + _ROW - 6), fill="#b8d4f0")
            pen.text((left + 4, top + 2), f"{probability:.1%}  {name}"[:70], fill="black")
        y += height
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error}", "name another place with --picture") from error


def _class_names(labels: Path | None, known: tuple[str, ...] | None, num_classes: int) -> tuple[str, ...]:
    if labels is not None:
        return read_class_names(labels, num_classes)
    if known is None or len(known) != num_classes:
        return tuple(f"class {number}" for number in range(num_classes))
    return known
