"""Scalars and pictures for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

#: What of a metrics row is drawn, and under which heading.
_SCALARS = {
    "loss": "train/loss",
    "validation_loss": "validation/loss",
    "validation_top1": "validation/top1",
    "validation_top5": "validation/top5",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "images_per_second": "speed/images_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
}


class TensorBoard:
    """Writes event files; a resumed run hides what a killed one wrote after the checkpoint."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # From purge_step on TensorBoard forgets what was there, also that of a life that never saved.
        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def row(self, row: dict[str, Any]) -> None:
        for key, tag in _SCALARS.items():
            if row.get(key) is not None:
                self._writer.add_scalar(tag, row[key], row["step"])
        for place, largest in row.get("amplitudes", {}).items():
            self._writer.add_scalar(f"amplitude/{place}", largest, row["step"])

    def image(self, tag: str, image: Image, step: int) -> None:
        self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
