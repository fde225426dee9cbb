"""COCO: images and instances JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swinv2_scale.data.sources.listing import Item, Keys, Source, json_bytes, locate
from swinv2_scale.errors import DataError

_NAMES = {"train": "train2017", "validation": "val2017"}


def list_coco(root: Path, split: str) -> Source:
    """``{train,val}2017/`` and ``annotations/instances_{train,val}2017.json``; every image, annotated or not.

    A sample's ``.json`` has ``image_id file_name width height`` and its ``annotations`` as published: boxes xywh in
    pixels of that width and height, whatever size the image is written with. The manifest has the ``categories``.

    Raises:
        DataError: a file is missing, or the JSON isn't COCO's.
    """
    name = _NAMES[split]
    path = Path("annotations") / f"instances_{name}.json"
    root = locate(root, str(path))
    try:
        with (root / path).open(encoding="utf-8") as file:
            data = json.load(file)
        annotations: dict[int, list[dict[str, Any]]] = {}
        for annotation in data["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        keys = Keys()
        items = []
        for image in sorted(data["images"], key=lambda image: str(image["file_name"])):
            known = {
                "image_id": image["id"],
                **{field: image[field] for field in ("file_name", "width", "height")},
                "annotations": annotations.pop(image["id"], []),
            }
            file_name = f"{name}/{image['file_name']}"
            if ".." in file_name.split("/"):  # an absolute one stays below the folder
                raise ValueError(f"the file name {image['file_name']!r}")
            items.append(Item(keys.of(file_name), (file_name,), None, json_bytes(known)))
        schema = {"categories": data["categories"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{root / path} is not COCO's: {error!r}", "unpack the annotations again") from error
    if annotations:
        raise DataError(
            f"{root / path} annotates {len(annotations)} images that it doesn't list: {min(annotations)}, .."
        )
    return Source(root, items, schema)
