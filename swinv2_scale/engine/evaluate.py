"""Validation loss and the reconstruction panel, exact over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image

from swinv2_scale import dist
from swinv2_scale.data.ledger import Quarantined
from swinv2_scale.data.loader import Batch
from swinv2_scale.tasks.base import Task


def validation_loss(engine: Any, task: Task, batches: Iterator[Batch]) -> tuple[float, list[Quarantined]]:
    """Mean loss over the validation samples, each counted once, the same on every rank; and those that were left out.

    Args:
        batches: this rank's batches; all ranks get the same number of them.

    Raises:
        DataError: on every rank, if a sample can't be read on any and the run doesn't allow for that.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    lost: list[Quarantined] = []
    with _evaluating(engine):
        while (batch := dist.all_agree(lambda: next(batches, None), "reading validation samples")) is not None:
            sums += task.evaluation_sums(engine, batch.to(engine.device))
            lost += batch.quarantined
    total, weight = dist.sum_over_ranks(sums).tolist()
    # Without a whole sample there is no loss; more are lost then than any run allows.
    loss = float(total / weight) if weight else math.nan
    return loss, [sample for samples in dist.gather(lost) for sample in samples]


def panel(engine: Any, task: Task, batch: Batch, title: str) -> Image:
    """The task's picture of one batch; every rank takes part with the same batch."""
    with _evaluating(engine):
        return task.panel(engine, batch.to(engine.device), title)


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
