"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch
from torch import nn

from swinv2_scale.config.run import OptimConfig
from swinv2_scale.engine.adamw import AdamW
from swinv2_scale.plan.parameters import parameter_groups


def build_optimizer(model: nn.Module, shapes: dict[str, torch.Size], config: OptimConfig) -> AdamW:
    """AdamW over groups of parameters: decayed and not, and of each layer where its learning rate is its own.

    A group's learning rate is ``lr_scale`` times that of the schedule.

    Args:
        shapes: whole shapes by name; under ZeRO-3 the parameters themselves are empty.
    """
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": config.weight_decay if group.is_decayed else 0.0,
            "lr_scale": config.layer_decay**group.layers_above,
        }
        for group in parameter_groups(shapes, by_layer=config.layer_decay < 1)
    ]
    return AdamW(groups, config.ema_decay, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of update ``step`` (counted from 0): linear warm-up, then what ``schedule`` says.

    A pure function: nothing to save, nothing to restore.
    """
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / config.warmup_steps
    if config.schedule == "multistep":
        return max(config.lr * config.gamma ** bisect_right(config.milestones, step), config.min_lr)
    progress = min((step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1), 1.0)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
