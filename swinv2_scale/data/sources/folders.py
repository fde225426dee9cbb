"""Folders of images: a class each, or none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from swinv2_scale.data.images.decode import IMAGE_FORMATS
from swinv2_scale.data.sources.listing import Item, Keys, Source, files_below, note_others, subfolders
from swinv2_scale.errors import DataError


def list_image_folder(folder: Path) -> Source:
    """``folder/CLASS/**/IMAGE`` as torchvision's ImageFolder reads it: classes are numbered in the order of names.

    Images directly in ``folder`` are taken too, without a class.

    Raises:
        DataError: no image found.
    """
    classes = subfolders(folder)
    source = list_class_folders(folder, {name: label for label, name in enumerate(classes)}, classes)
    if len(classes) > 1 and all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        source.notes.append(
            "the classes' names are numbers and are numbered as text is sorted ('10' before '2'), as torchvision does; "
            "--from imagenet-v2 reads ImageNet-V2"
        )
    return source


def list_class_folders(folder: Path, labels: dict[str, int], classes: list[str]) -> Source:
    """Images below ``folder``, labelled by the first folder on their path.

    Args:
        labels: of each folder.
        classes: names in the order of labels; none if nothing is labelled.

    Raises:
        DataError: no image found.
    """
    others: Counter[str] = Counter()
    keys = Keys()
    items = []
    seen: Counter[int | None] = Counter()
    for path in files_below(folder, IMAGE_FORMATS.__contains__, others):
        label = labels[path.partition("/")[0]] if "/" in path else None
        seen[label] += 1
        items.append(Item(keys.of(path), (path,), label))
    if not items:
        raise DataError(f"no images below {folder}", f"images are files named *.{', *.'.join(IMAGE_FORMATS)}")
    notes = note_others(others)
    empty = [name for name, label in labels.items() if not seen[label]]
    if empty:
        notes.append(f"{len(empty)} classes have no image: {', '.join(empty[:5])}{', ..' if len(empty) > 5 else ''}")
    if classes and seen[None]:
        notes.append(f"{seen[None]} images lie in no class's folder and got no label")
    return Source(folder, items, {"classes": classes} if classes else {}, notes)
