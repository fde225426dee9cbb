"""One training step, and the state that is all a resumed run needs to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.ledger import EpochAccount, Ledger
from swinv2_scale.data.loader import Batch
from swinv2_scale.engine.anomalies import Usual
from swinv2_scale.engine.guards import Update, guarded_update, spoil_gradient_if_not_finite
from swinv2_scale.tasks.base import Task


@dataclass(frozen=True)
class TrainState:
    """Where a training is. Everything else follows from it: position in the data, learning rate, every random draw."""

    step: int = 0  # updates so far, skipped ones included
    samples_seen: int = 0  # the position in the data, ahead of step x batch by the samples that rewinds left out
    skipped_in_a_row: int = 0
    rewinds: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    usual: Usual = field(default_factory=Usual)
    best_score: float | None = None  # of all validations so far, smaller is better
    validations_since_best: int = 0

    def advanced(self, samples: int, is_applied: bool, ledger: Ledger, usual: Usual) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + samples,
            skipped_in_a_row=0 if is_applied else self.skipped_in_a_row + 1,
            ledger=ledger,
            usual=usual,
        )

    def validated(self, score: float) -> TrainState:
        if math.isfinite(score) and (self.best_score is None or score < self.best_score):
            return replace(self, best_score=score, validations_since_best=0)
        return replace(self, validations_since_best=self.validations_since_best + 1)

    def is_over(self, config: RunConfig) -> bool:
        """Whether the run is done: all steps made, or ``evaluation.patience`` used up."""
        patience = config.evaluation.patience
        is_stuck = patience is not None and self.validations_since_best >= patience
        return is_stuck or self.step >= config.optim.total_steps

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """What to_json() gave, equal to the bit; other keys of ``data`` are left alone.

        Raises:
            KeyError, TypeError: it was written by another version.
        """
        names = ("step", "samples_seen", "skipped_in_a_row", "rewinds", "best_score", "validations_since_best")
        plain = {key: data[key] for key in names}
        accounts = tuple(EpochAccount(**account) for account in data["ledger"]["accounts"])
        return cls(**plain, ledger=Ledger(accounts), usual=Usual.from_json(data["usual"]))


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank but for the losses."""

    loss: float
    grad_norm: float
    is_applied: bool
    data_digest: str
    tally: list[list[int]]  # of the step's epochs, see data/ledger.py
    micro_losses: Tensor  # of this rank's micro-batches


def train_step(
    engine: Any, task: Task, batches: list[Batch], lr: float, may_step: Callable[[float, float], bool]
) -> StepResult:
    """Forward and backward over one rank's micro-batches, then one update by all ranks.

    Args:
        engine: the live DeepSpeed engine.
        batches: the micro-batches of this rank, as many as DeepSpeed accumulates.
        may_step: whether an update of this loss and this finite gradient norm may be; a pure function.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    losses: list[Tensor] = []
    for number, batch in enumerate(batches, 1):
        micro_loss = task.loss(engine, batch.to(engine.device))
        losses.append(micro_loss.detach())
        engine.backward(spoil_gradient_if_not_finite(micro_loss))
        if number < len(batches):
            engine.step()
    micro_losses = torch.stack(losses)
    # Before the update: it must not be if the loss is a spike.
    loss = dist.sum_over_ranks(micro_losses.double().mean()).item() / dist.world_size()
    update: Update = guarded_update(engine, lambda grad_norm: may_step(loss, grad_norm))
    digest = torch.tensor([sum(batch.digest for batch in batches)], dtype=torch.int64)
    tally = torch.stack([batch.tally for batch in batches]).sum(0)
    counts = dist.sum_over_ranks(torch.cat((digest, tally.flatten())).to(engine.device)).cpu()
    return StepResult(
        loss=loss,
        grad_norm=update.grad_norm,
        is_applied=update.is_applied,
        data_digest=f"{int(counts[0]):016x}",
        tally=counts[1:].view_as(tally).tolist(),
        micro_losses=micro_losses,
    )
