"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from swinv2_scale.config.run import OptimConfig
from swinv2_scale.engine.adamw import AdamW
from swinv2_scale.plan.parameters import is_decayed


def build_optimizer(model: nn.Module, shapes: dict[str, torch.Size], config: OptimConfig) -> AdamW:
    """AdamW over two groups, decayed and not.

    Args:
        shapes: whole shapes by name; under ZeRO-3 the parameters themselves are empty.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(name, shapes[name]) else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": torch.cuda.is_available()}
    return AdamW(groups, config.ema_decay, **settings)


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of update ``step`` (counted from 0): linear warm-up, then half a cosine down to ``min_lr``.

    A pure function: nothing to save, nothing to restore.
    """
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
