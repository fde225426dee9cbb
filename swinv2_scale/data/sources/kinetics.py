"""Kinetics as the CVDF distributes it: clips, and a CSV that labels them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from swinv2_scale.data.clips import VIDEO_EXTENSIONS
from swinv2_scale.data.sources.listing import (
    Item,
    Keys,
    Source,
    files_below,
    first_existing,
    json_bytes,
    note_others,
    read_rows,
)
from swinv2_scale.errors import DataError

_NAMES = {"train": ("train",), "validation": ("val", "validate", "validation")}


def list_kinetics(root: Path, split: str) -> Source:
    """``{train,val}/**/ID_START_END.mp4`` (times of six digits), ``annotations/{train,val}.csv`` or the CSV in root.

    Labels are positions in the sorted names of all classes, of both splits' CSVs where both are there. Clips that the
    CSV lists but that aren't there (videos vanish from the net) are counted in the notes.

    Raises:
        DataError: no CSV, no folder, or none of the clips.
    """
    table = _table(root, split)
    folder = first_existing(root / name for name in _NAMES[split])
    if table is None or folder is None:
        name = _NAMES[split][0]
        raise DataError(f"{root} has no {f'annotations/{name}.csv' if table is None else f'folder {name}/'}")
    rows = list(read_rows(table, "label", "youtube_id", "time_start", "time_end"))
    tables = [found for other in _NAMES if (found := _table(root, other)) is not None]
    classes = sorted({row["label"] for found in tables for row in read_rows(found, "label")})
    labels = {name: label for label, name in enumerate(classes)}

    others: Counter[str] = Counter()
    clips: dict[str, str] = {}
    for path in files_below(folder, VIDEO_EXTENSIONS.__contains__, others):
        clips.setdefault(os.path.splitext(os.path.basename(path))[0], path)
    keys = Keys()
    items = []
    num_found = len(clips)
    listed: dict[str, tuple[int, bytes]] = {}
    for row in rows:
        try:
            times = {field: int(float(row[field])) for field in ("time_start", "time_end")}
        except ValueError as error:
            raise DataError(f"{table}: {row['youtube_id']} has no time: {error}") from error
        name = f"{row['youtube_id']}_{times['time_start']:06d}_{times['time_end']:06d}"
        listed.setdefault(name, (labels[row["label"]], json_bytes({"youtube_id": row["youtube_id"], **times})))
    for name in sorted(listed):
        if name in clips:
            path = clips.pop(name)
            items.append(Item(keys.of(path), (path,), *listed[name]))
    if not items:
        raise DataError(f"none of the {len(listed)} clips of {table} is among the {num_found} in {folder}")
    notes = note_others(others)
    if len(items) < len(listed):
        notes.append(f"{len(listed) - len(items)} of {len(listed)} clips of {table.name} are not there")
    if clips:
        notes.append(f"{len(clips)} clips are not in {table.name} and were left out")
    if len(listed) < len(rows):
        notes.append(f"{len(rows) - len(listed)} rows of {table.name} repeat a clip; the first one counts")
    return Source(folder, items, {"classes": classes}, notes)


def _table(root: Path, split: str) -> Path | None:
    names = [f"{name}.csv" for name in _NAMES[split]]
    return first_existing(place / name for place in (root / "annotations", root) for name in names)
