"""Metrics over held-back samples and pictures of them, exact over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.data.ledger import Quarantined
from swinv2_scale.data.loader import Batch
from swinv2_scale.tasks.base import Task


@dataclass(frozen=True)
class Validation:
    """What an evaluation found.

    Attributes:
        metrics: by name; the same on every rank.
        score: what ``evaluation.metric`` says, smaller is better.
        sums: float64, what the task makes metrics and pictures of.
    """

    metrics: dict[str, float]
    score: float
    sums: Tensor

    @property
    def loss(self) -> float:
        return self.metrics["loss"]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.2%}" for name, value in self.metrics.items()
        )


def evaluate(
    engine: Any, task: Task, batches: Iterator[Batch], metric: str = "loss"
) -> tuple[Validation, list[Quarantined]]:
    """Metrics over the validation samples, each counted once, and those that were left out.

    Args:
        engine: or the task's model itself, on the device of this process.
        batches: this rank's batches; all ranks get the same number of them, one at least.
        metric: what is judged by: the loss, or a share that should be large.

    Raises:
        DataError: on every rank, if a sample can't be read on any and the run doesn't allow for that.
    """
    sums: Tensor | None = None
    lost: list[Quarantined] = []
    with _evaluating(engine):
        while (batch := dist.all_agree(lambda: next(batches, None), "reading validation samples")) is not None:
            found = task.evaluation_sums(engine, batch.to(dist.device()))
            sums = found if sums is None else sums + found
            lost += batch.quarantined
    assert sums is not None
    sums = dist.sum_over_ranks(sums).cpu()
    metrics = task.metrics(sums)
    score = metrics[metric] if metric == "loss" else 1 - metrics[metric]
    return Validation(metrics, score, sums), [sample for samples in dist.gather(lost) for sample in samples]


def panel(engine: Any, task: Task, batch: Batch, title: str) -> Image:
    """The task's picture of one batch; every rank takes part with the same batch."""
    with _evaluating(engine):
        return task.panel(engine, batch.to(dist.device()), title)


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
