"""Models whose parameters may be partitioned: build them, know their true shapes, write values into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.engine.deepspeed_import import deepspeed


def build(build_model: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """Build a model, at ZeRO stage 3 with every parameter partitioned as soon as it is made.

    The values are undefined: ``zero.Init`` silently drops what constructors write, so nothing relies on them.
    """
    if ds_config["zero_optimization"]["stage"] < 3:
        with dist.device():
            return build_model()
    deepspeed.init_distributed()  # wraps the group of dist.start(); zero.Init takes the world size from it
    # No dtype= here: zero.Init 0.19.8 reads `dtype or fp16 if supported else bf16`, which makes float32 into bfloat16
    # on a CPU. It takes the right type from the configuration.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        return build_model()


def full_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every parameter, also where this rank holds a part of it."""
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


@torch.no_grad()
def assign(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole float32 values into parameters, rounded to their type, one at a time.

    Before ``deepspeed.initialize``. Every rank hands in the same values.
    """
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        is_partitioned = hasattr(parameter, "ds_id")
        # modifier_rank=0: without it the write is dropped, again silently.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=is_partitioned):
            if not is_partitioned or dist.rank() == 0:
                parameter.copy_(value)


@torch.no_grad()
def assign_masters(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole float32 values into the float32 masters of a bf16 engine, unrounded.

    After ``deepspeed.initialize``, which makes the masters out of the bf16-rounded weights.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    stage_zero = _stage_zero_masters(engine)
    parameters = dict(engine.module.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        if parameter in stage_zero:
            stage_zero[parameter].copy_(value)
        elif not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            # DeepSpeed's whole-value setter fails where the last rank's part is padded; the local one takes a part.
            size = parameter.ds_tensor.numel()
            flat = torch.zeros(size * dist.world_size(), device=parameter.ds_tensor.device)
            flat[: value.numel()].copy_(value.flatten())
            safe_set_local_fp32_param(parameter, flat.narrow(0, size * dist.rank(), size))


def _stage_zero_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Stage 0 in bf16 keeps its masters in lists beside the weights, which DeepSpeed's setters don't know."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    return {
        weight: master
        for group, master_group in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        for weight, master in zip(group, master_group, strict=True)
    }
