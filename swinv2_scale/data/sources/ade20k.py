"""ADE20K as the scene parsing benchmark has it: images, masks of 150 classes, scenes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from swinv2_scale.data.sources.listing import (
    Item,
    Keys,
    Source,
    files_below,
    json_bytes,
    locate,
    note_others,
    read_text,
)
from swinv2_scale.errors import DataError

NUM_CLASSES = 150


def list_ade20k(root: Path, split: str) -> Source:
    """``ADEChallengeData2016/{images,annotations}/{training,validation}/``: each image with its mask ``.seg.png``.

    A mask's value is the class, 1 to 150; 0 is everything else. The scene of ``sceneCategories.txt``, where that is,
    goes into a ``.json``.

    Raises:
        DataError: folders or masks are missing.
    """
    folder = "training" if split == "train" else "validation"
    root = locate(root, f"images/{folder}")
    others: Counter[str] = Counter()
    masks = set(files_below(root / "annotations" / folder, "png".__eq__, others))
    scenes = _scenes(root / "sceneCategories.txt")
    keys = Keys()
    items = []
    for path in files_below(root / "images" / folder, "jpg".__eq__, others):
        name = path.removesuffix(".jpg")
        if f"{name}.png" not in masks:
            raise DataError(f"images/{folder}/{path} has no annotations/{folder}/{name}.png in {root}")
        files = (f"images/{folder}/{path}", f"annotations/{folder}/{name}.png")
        scene = scenes.get(name)
        items.append(Item(keys.of(f"{folder}/{path}"), files, None, json_bytes({"scene": scene}) if scene else None))
    if not items:
        raise DataError(f"no *.jpg below {root / 'images' / folder}")
    return Source(root, items, _schema(root / "objectInfo150.txt"), note_others(others), NUM_CLASSES)


def _scenes(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    pairs = (line.split() for line in read_text(path).splitlines() if line.strip())
    return {pair[0]: pair[-1] for pair in pairs}


def _schema(path: Path) -> dict[str, list[str]]:
    """Names of the masks' values, 0 first: the table's columns are Idx, Ratio, Train, Val, Stuff, Name."""
    if not path.exists():
        return {}
    names = [line.split("\t")[-1].strip() for line in read_text(path).splitlines()[1:] if line.strip()]
    return {"mask_classes": ["other", *names]}
