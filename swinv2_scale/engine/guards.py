"""An update that must not be reaches no weight, no moment and no average, on no rank, at any ZeRO stage.

DeepSpeed 0.19.8 skips a non-finite gradient without a word at most stages, and takes it at stage 0 in float32; a finite
one it always takes. Our AdamW asks at the last moment, when the norm of the whole gradient is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swinv2_scale.engine.zero import adamw


@dataclass(frozen=True)
class Update:
    """What became of an update, the same on every rank."""

    is_applied: bool
    grad_norm: float  # global, before clipping; NaN where it wasn't finite


def spoil_gradient_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself, bit for bit; but one that isn't finite gets a NaN gradient.

    A non-finite loss on one rank so becomes a non-finite gradient norm on all of them, and there is one gate to guard;
    no rank waits for another's verdict.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def guarded_update(engine: Any, may_step: Callable[[float], bool]) -> Update:
    """``engine.step()`` at the accumulation boundary; leaves all as it was if the update must not be.

    Args:
        may_step: of a finite gradient norm; must say the same on every rank, and whenever it is asked: DeepSpeed steps
            once for each of its groups.
    """
    optimizer = adamw(engine)
    # Stage 0 in float32 clips before our AdamW is asked. The gradients are averaged already: all ranks see the same.
    plain_norm = _norm(engine.module) if optimizer is engine.optimizer else None

    def grad_norm() -> float:
        return plain_norm if plain_norm is not None else float(engine.optimizer._global_grad_norm)

    def is_good() -> bool:
        norm = grad_norm()
        return math.isfinite(norm) and may_step(norm)

    optimizer.may_step = is_good
    engine.step()
    if not engine.was_step_applied():  # DeepSpeed's own verdict; it doesn't know of the gate's
        return Update(False, math.nan)
    norm = grad_norm()
    return Update(is_good(), norm if math.isfinite(norm) else math.nan)


def _norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
