"""Updates whose loss or gradient isn't finite, or is far above what it was: how they are found, and what follows.

Plain functions of numbers that all ranks have alike, so all come to the same verdict without asking each other; and of
numbers that checkpoints carry, so a resumed run comes to the verdicts of an unbroken one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from swinv2_scale.config.run import AnomaliesConfig
from swinv2_scale.engine.amplitudes import Amplitudes
from swinv2_scale.errors import DivergedError

Kind = Literal["non-finite loss", "non-finite gradient", "loss spike", "gradient spike"]
#: warn: the update was taken all the same. skip: it was refused, and that is all.
Action = Literal["warn", "skip", "rewind", "stop"]

#: The deviation of a loss counts as this share of its mean at least: a rise of a few percent is no accident, however
#: smooth the training is.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class Running:
    """Mean and variance of a number: plain ones at first, then exponentially weighted ones.

    The mean lags behind a loss that falls, and the variance counts the fall: no fresh training alarms (see the tests).
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def with_value(self, value: float, window: int) -> Running:
        """
        Source: Finch, Incremental calculation of weighted mean and variance (2009), eq. 124 and 143.
        """
        weight = max(1 / (self.count + 1), 2 / (window + 1))  # as much memory as a plain mean over the window
        difference = value - self.mean
        variance = (1 - weight) * (self.variance + weight * difference**2)
        return Running(self.count + 1, self.mean + weight * difference, variance)

    @property
    def deviation(self) -> float:
        least = max(_LEAST_DEVIATION * abs(self.mean), sys.float_info.min)  # of a loss that was always 0
        return max(math.sqrt(self.variance), least)


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with an update.

    Attributes:
        loss_z: standard deviations above the mean; None before the warm-up is over, and where there is no number.
        grad_norm_factor: how many times the mean; None likewise.
    """

    kind: Kind
    loss_z: float | None = None
    grad_norm_factor: float | None = None

    @property
    def is_spike(self) -> bool:
        return self.kind.endswith("spike")

    def is_refused(self, config: AnomaliesConfig) -> bool:
        """Whether the update must not reach the weights."""
        return not self.is_spike or config.policy != "warn"


@dataclass(frozen=True)
class Usual:
    """The losses and gradient norms that a training has had so far; part of every checkpoint."""

    loss: Running = Running()
    grad_norm: Running = Running()

    def find(self, loss: float, grad_norm: float, config: AnomaliesConfig) -> Anomaly | None:
        """What is wrong with an update of this loss and gradient norm, if anything is."""
        if not math.isfinite(loss):
            return Anomaly("non-finite loss")
        if not math.isfinite(grad_norm):
            return Anomaly("non-finite gradient")
        if self.loss.count < config.warmup_steps:
            return None
        loss_z = (loss - self.loss.mean) / self.loss.deviation
        factor = grad_norm / max(self.grad_norm.mean, sys.float_info.min)
        if loss_z > config.loss_z:
            return Anomaly("loss spike", loss_z, factor)
        return Anomaly("gradient spike", loss_z, factor) if factor > config.grad_norm_factor else None

    def with_update(self, loss: float, grad_norm: float, config: AnomaliesConfig) -> Usual:
        """After an update that was taken.

        A spike that was taken counts as the largest value that is none: one outlier doesn't hide the next, and a
        lasting change of level is usual after a while.
        """
        if self.loss.count >= config.warmup_steps:
            loss = min(loss, self.loss.mean + config.loss_z * self.loss.deviation)
            grad_norm = min(grad_norm, config.grad_norm_factor * max(self.grad_norm.mean, sys.float_info.min))
        window = config.window_steps
        return Usual(self.loss.with_value(loss, window), self.grad_norm.with_value(grad_norm, window))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Usual:
        """Of ``dataclasses.asdict``; JSON gives every float back to the bit."""
        return cls(Running(**data["loss"]), Running(**data["grad_norm"]))


def action_after(anomaly: Anomaly, refused_in_a_row: int, rewinds: int, config: AnomaliesConfig) -> Action:
    """What an anomaly leads to.

    Args:
        refused_in_a_row: updates, this one included.
        rewinds: so far in the run.
    """
    if anomaly.is_spike and config.policy in ("warn", "stop"):
        return config.policy
    if refused_in_a_row <= config.max_skipped_steps and not (anomaly.is_spike and config.policy == "rewind"):
        return "skip"
    return "rewind" if rewinds < config.max_rewinds else "stop"


@dataclass(frozen=True)
class Report:
    """An anomaly, for people and for RUN/anomalies.jsonl."""

    anomaly: Anomaly
    action: Action
    step: int
    loss: float
    grad_norm: float
    refused_in_a_row: int
    samples_seen: int  # after the update
    positions: range  # of its samples, in the order of the training
    epochs: list[tuple[int, int]]  # (source, number) that these can belong to
    micro_batches: list[dict[str, Any]]  # of all ranks: rank, loss, keys
    amplitudes: Amplitudes

    def text(self, config: AnomaliesConfig) -> str:
        """What happened, where to look, and what comes next."""
        what = self.happened(config)
        if self.anomaly.is_refused(config):
            what += "; the update was refused, no weight has changed on any rank"
        next_step = {
            "warn": "the update was taken (anomalies.policy is warn)",
            "skip": f"going on without its samples ({self.refused_in_a_row} in a row; more than "
            f"anomalies.max_skipped_steps={config.max_skipped_steps} lead to a rewind)",
            "rewind": "going back to the last checkpoint, and on without the samples since",
            "stop": "stopping",
        }[self.action]
        ranks = sorted({batch["rank"] for batch in self.micro_batches if not math.isfinite(batch["loss"])})
        began = f" The loss is not finite on rank {', '.join(map(str, ranks))}." if ranks else ""
        return f"{what}. Its samples are listed in RUN/anomalies.jsonl.{began} Next: {next_step}"

    def happened(self, config: AnomaliesConfig) -> str:
        """In half a sentence."""
        kind, where = self.anomaly.kind, f"step {self.step}"
        if kind == "loss spike":
            return (
                f"{where}: the loss is {self.loss:.4g}, {self.anomaly.loss_z:.3g} standard deviations above its mean "
                f"(anomalies.loss_z is {config.loss_z:g})"
            )
        if kind == "gradient spike":
            return (
                f"{where}: the gradient norm is {self.grad_norm:.4g}, {self.anomaly.grad_norm_factor:.3g} times its "
                f"mean (anomalies.grad_norm_factor is {config.grad_norm_factor:g})"
            )
        return f"{where}: the {kind.removeprefix('non-finite ')} is not finite"

    def error(self, config: AnomaliesConfig, rewinds: int) -> DivergedError:
        """Why the run stops, for all ranks to raise."""
        if self.anomaly.is_spike and config.policy == "stop":
            error = DivergedError(
                f"{self.happened(config)}; anomalies.policy is stop, the update was refused",
                "its samples are listed in RUN/anomalies.jsonl; the same command goes on from the last checkpoint, "
                "with anomalies.policy=skip without these samples, with =warn with them",
            )
        else:
            error = DivergedError(
                f"{self.happened(config)}; {self.refused_in_a_row} updates in a row were refused, after {rewinds} "
                f"rewinds (anomalies.max_skipped_steps is {config.max_skipped_steps}, max_rewinds "
                f"{config.max_rewinds})",
                "lower optim.lr or optim.clip_grad_norm and start the same command again: it goes on from the last "
                "checkpoint, whose weights are finite; RUN/anomalies.jsonl lists the samples and where it began",
            )
        error.is_shared = True
        return error

    def row(self) -> dict[str, Any]:
        """For RUN/anomalies.jsonl."""
        first = self.amplitudes.first_non_finite
        return {
            "step": self.step,
            "kind": self.anomaly.kind,
            "action": self.action,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "loss_z": self.anomaly.loss_z,
            "grad_norm_factor": self.anomaly.grad_norm_factor,
            "samples_seen": self.samples_seen,
            "positions": [self.positions.start, self.positions.stop],
            "epochs": self.epochs,
            "micro_batches": self.micro_batches,
            "amplitudes": self.amplitudes.largest,
            "first_non_finite": first and {"place": first[0], "rank": first[1]},
        }


def micro_batches_of(gathered: Iterable[tuple[list[float], list[tuple[str, ...]]]]) -> list[dict[str, Any]]:
    """Every rank's (losses, keys) of its micro-batches as rows."""
    return [
        {"rank": rank, "loss": loss, "keys": list(keys)}
        for rank, (losses, all_keys) in enumerate(gathered)
        for loss, keys in zip(losses, all_keys, strict=True)
    ]
