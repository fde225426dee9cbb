"""Real photographs that come with the package, as samples for the shard writer."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from swinv2_scale.data.shards.writer import RawSample, write_shards
from swinv2_scale.errors import DataError, OutputError

EMBEDDED_PREFIX = "embedded:"
#: Name -> samples a shard. fashion-mnist: 8,000 + 2,000 labelled grey photographs of 28x28; photographs: colour
#: photographs of 300 to 1411 px from scikit-image's wheel (extra "photos"), each whole and in four overlapping parts.
EMBEDDED = {
    "fashion-mnist/train": 1000,
    "fashion-mnist/validation": 1000,
    "photographs/train": 8,
    "photographs/validation": 8,
}
#: Fashion-MNIST's, by label.
_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "validation": ("chelsea.png", "coffee.png"),
}


def embedded_shards(name: str, shards_dir: Path) -> str:
    """Write an embedded data set as tars unless that has been done; returns the pattern of its shards.

    Args:
        name: ``embedded:fashion-mnist/train`` and the like.

    Raises:
        DataError: no such data set.
        OutputError: the folder can't be written.
    """
    short = name.removeprefix(EMBEDDED_PREFIX)
    if short not in EMBEDDED:
        raise DataError(f"no embedded data set {short!r}", f"there are: {', '.join(EMBEDDED)}")
    folder = shards_dir / short
    if not folder.exists():
        source, _, split = short.partition("/")
        samples = fashion_mnist(split) if source == "fashion-mnist" else photographs(split)
        try:
            schema = {"classes": _CLASSES} if source == "fashion-mnist" else {}
            write_shards(samples, folder, samples_per_shard=EMBEDDED[short], made_by=name, schema=schema)
        except OutputError:
            if not folder.exists():  # else another job was first; the bytes are the same
                raise
    return str(folder / "*.tar")


def fashion_mnist(split: str) -> Iterator[RawSample]:
    """``train`` or ``validation``: PNG and class of each image."""
    folder = resources.files("swinv2_scale.data") / "embedded"

    def read(kind: str, header: int) -> NDArray[np.uint8]:
        data = gzip.decompress((folder / f"fashion_mnist-{split}-{kind}.idx.gz").read_bytes())
        return np.frombuffer(data, np.uint8, offset=header)

    images, labels = read("images", 16).reshape(-1, 28, 28), read("labels", 8)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        yield {"__key__": f"{split}-{number:06d}", "png": _encode(Image.fromarray(pixels)), "cls": str(label).encode()}


def photographs(split: str) -> Iterator[RawSample]:
    """``train`` or ``validation``: each colour photograph, and four overlapping parts of it.

    Raises:
        DataError: scikit-image is not installed.
    """
    try:
        folder = Path(str(resources.files("skimage.data")))
    except ModuleNotFoundError as error:
        raise DataError("embedded:photographs needs scikit-image", "pip install 'swinv2-scale[photos]'") from error
    for name in _PHOTOGRAPHS[split]:
        with Image.open(folder / name) as image:
            w, h = image.size
            width, height = w - w // 3, h - h // 3
            boxes = [(0, 0, w, h)]
            boxes += [(x, y, x + width, y + height) for x in (0, w // 3) for y in (0, h // 3)]
            for number, box in enumerate(boxes):
                yield {"__key__": f"{Path(name).stem}-{number}", "png": _encode(image.crop(box))}


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
