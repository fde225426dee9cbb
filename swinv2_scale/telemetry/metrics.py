"""``metrics.jsonl``: exactly one line a step, also after kills and resumes."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch

from swinv2_scale.durable import sync_file, write_whole


class MetricsFile:
    """Appends one JSON object a step.

    Args:
        path: the file; rows past ``resumed`` belong to a future that is trained anew, and are dropped.
        key: what ``resumed`` counts.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, path: Path, resumed: int, key: str = "step") -> None:
        kept = [row for row in read_metrics(path) if row[key] <= resumed] if path.exists() else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; numbers that JSON has no word for become null."""
        self._file.write(json.dumps(_clean(row)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the rows survive a power cut; called when a checkpoint says that they exist."""
        sync_file(self._file)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: the allocator's on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
