"""A non-finite loss or gradient never reaches the weights, at any ZeRO stage.

DeepSpeed 0.19.8 skips such an update without a word at stages 1 to 3, and takes it at stage 0 in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What became of an update, the same on every rank."""

    is_applied: bool
    grad_norm: float  # global, before clipping; NaN where it wasn't applied


def spoil_gradient_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself, bit for bit; but one that isn't finite gets a NaN gradient.

    A non-finite loss on one rank so becomes a non-finite gradient norm on all of them, and there is one gate to guard;
    no rank waits for another's verdict.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def guarded_update(engine: Any) -> Update:
    """``engine.step()`` at the accumulation boundary; leaves every weight as it was if the gradient isn't finite."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return _guarded_plain_update(engine)
    engine.step()
    if not engine.was_step_applied():
        return Update(False, math.nan)
    return Update(True, float(engine.get_global_grad_norm()))


def _guarded_plain_update(engine: Any) -> Update:
    """Stage 0 in float32: DeepSpeed hands the gradients to torch's optimizer unchecked.

    They are averaged already, so every rank sees the same ones and comes to the same verdict.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return Update(True, norm)
    # The engine has to count the step, the optimizer must not take it (zeros would still decay its moments), and
    # clipping must not meet the NaN.
    for gradient in gradients:
        gradient.zero_()
    engine.optimizer.step = lambda *_, **__: None
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    return Update(False, math.nan)
