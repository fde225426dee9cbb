"""One training step, and the state that is all a resumed run needs to go on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.data.ledger import Ledger
from swinv2_scale.data.loader import Batch
from swinv2_scale.engine.guards import Update, guarded_update, spoil_gradient_if_not_finite
from swinv2_scale.tasks.base import Task


@dataclass(frozen=True)
class TrainState:
    """Where a training is. Everything else follows from it: position in the data, learning rate, every random draw."""

    step: int = 0  # updates so far, skipped ones included
    samples_seen: int = 0
    skipped_in_a_row: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    def advanced(self, samples: int, is_applied: bool, ledger: Ledger) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + samples,
            skipped_in_a_row=0 if is_applied else self.skipped_in_a_row + 1,
            ledger=ledger,
        )


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank."""

    loss: float
    grad_norm: float
    is_applied: bool
    data_digest: str
    tally: list[list[int]]  # of the step's epochs, see data/ledger.py


def train_step(engine: Any, task: Task, batches: list[Batch], lr: float) -> StepResult:
    """Forward and backward over one rank's micro-batches, then one update by all ranks.

    Args:
        engine: the live DeepSpeed engine.
        batches: the micro-batches of this rank, as many as DeepSpeed accumulates.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    losses: list[Tensor] = []
    for number, batch in enumerate(batches, 1):
        loss = task.loss(engine, batch.to(engine.device))
        losses.append(loss.detach())
        engine.backward(spoil_gradient_if_not_finite(loss))
        if number < len(batches):
            engine.step()
    update: Update = guarded_update(engine)
    mean = torch.stack(losses).double().mean()
    loss_sum = dist.sum_over_ranks(mean).item()
    digest = torch.tensor([sum(batch.digest for batch in batches)], dtype=torch.int64)
    tally = torch.stack([batch.tally for batch in batches]).sum(0)
    counts = dist.sum_over_ranks(torch.cat((digest, tally.flatten())).to(engine.device)).cpu()
    return StepResult(
        loss=loss_sum / dist.world_size(),
        grad_norm=update.grad_norm,
        is_applied=update.is_applied,
        data_digest=f"{int(counts[0]):016x}",
        tally=counts[1:].view_as(tally).tolist(),
    )
