"""A CSV file of paths and labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from swinv2_scale.data.clips import VIDEO_EXTENSIONS
from swinv2_scale.data.images.decode import IMAGE_FORMATS
from swinv2_scale.data.sources.listing import Item, Keys, Source, extension_of, read_rows
from swinv2_scale.errors import DataError


def list_table(path: Path) -> Source:
    """Rows ``path,label`` below a header; paths start from the CSV's folder, the column ``label`` may be missing.

    Labels are integers from 0, or names, which are numbered in their sorted order; never some of each.

    Raises:
        DataError: no rows, a path that is no image or clip, or a label that doesn't fit.
    """
    keys = Keys()
    paths, texts = [], []
    for number, row in enumerate(read_rows(path, "path"), start=2):
        if extension_of(row["path"]) not in (*IMAGE_FORMATS, *VIDEO_EXTENSIONS):
            raise DataError(
                f"{path}, row {number}: {row['path']!r} is no image or clip (.{', .'.join(IMAGE_FORMATS)}, ..)"
            )
        paths.append(row["path"])
        texts.append(row.get("label", "").strip())
    if not paths:
        raise DataError(f"{path} has no rows")
    if not any(texts):
        return Source(path.parent, [Item(keys.of(name), (name,)) for name in paths])
    kinds = ["a number" if text.isdecimal() else "a name" if text else "missing" for text in texts]
    usual = Counter(kinds).most_common(1)[0][0]
    odd = next((number for number, kind in enumerate(kinds) if kind != usual), None)
    if odd is not None:
        raise DataError(
            f"{path}, row {odd + 2}: the label {texts[odd]!r} is {kinds[odd]}, in most rows it is {usual}",
            "labels are all integers from 0, all names, or all missing",
        )
    if usual == "a number":
        schema: dict[str, list[str]] = {}
        labels = [int(text) for text in texts]
    else:
        schema = {"classes": sorted(set(texts))}
        label_of = {name: label for label, name in enumerate(schema["classes"])}
        labels = [label_of[text] for text in texts]
    items = [Item(keys.of(name), (name,), label) for name, label in zip(paths, labels, strict=True)]
    return Source(path.parent, items, schema)
