"""From EngineConfig to DeepSpeed's JSON, and back: what the live engine really does must be what was asked."""

from __future__ import annotations

from typing import Any

import torch

from swinv2_scale.config.run import RunConfig
from swinv2_scale.errors import ConfigError, ConfigProblem
from swinv2_scale.models.block import Block
from swinv2_scale.plan.batch import accumulation_steps
from swinv2_scale.plan.zero import Sharding


def translate(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; the optimizer and the schedule are ours and handed over as objects."""
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": engine.overlap_comm,
        "reduce_bucket_size": engine.reduce_bucket_elements,
    }
    if engine.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": engine.prefetch_bucket_elements,
            "stage3_param_persistence_threshold": engine.param_persistence_elements,
            "stage3_max_live_parameters": engine.max_live_elements,
            # All parameters of a Swin block come and go at once. It has twelve modules with hooks else, and after each
            # DeepSpeed goes through all that are to come, to find what is used again within stage3_max_reuse_distance.
            "leaf_module": {"classes": [f"{Block.__module__}.{Block.__qualname__}"]},
        }
    sharding = Sharding.of(config, world_size)
    zero |= _offload(sharding)
    result: dict[str, Any] = {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": sharding.accumulation_steps,
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are stepped by torch's AdamW: nothing to compile
        "bf16": {"enabled": engine.precision == "bf16"},
        "steps_per_print": None,
    }
    if engine.precision == "bf16" and sharding.sum_width == 4:
        # Micro-batches are added up in float32: the default is the model's own type. Stage 0 has no such choice
        # in DeepSpeed 0.19.8 ("unsupported mix").
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.precision == "bf16_autocast":
        # No module is "safe" to communicate in bf16: the weights are float32 and stay so between ranks.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merged(result, engine.deepspeed_overrides)


def _offload(sharding: Sharding) -> dict[str, Any]:
    """DeepSpeed's sections for what lies elsewhere, and what they need beside them."""
    offload = sharding.config.engine.offload
    place = {"nvme_path": offload.nvme_dir, "pin_memory": torch.cuda.is_available()}
    found: dict[str, Any] = {}
    if offload.optimizer_states != "none":
        found["offload_optimizer"] = {"device": offload.optimizer_states, **place}
    if offload.optimizer_states == "nvme":
        found["offload_optimizer"]["buffer_count"] = 2 + sharding.num_moments  # the master and its gradient
        found["sub_group_size"] = offload.sub_group_elements
    if offload.parameters != "none":
        found["offload_param"] = {"device": offload.parameters, **place}
    if offload.parameters == "nvme":
        count, elements = sharding.parameter_buffers
        found["offload_param"] |= {"max_in_cpu": 0, "buffer_count": count, "buffer_size": elements}
    return found


def read_back(live: Any, config: RunConfig, world_size: int) -> None:
    """Compare the live engine with what was asked for.

    DeepSpeed accepts keys that it doesn't know, so a configuration that was sent proves nothing.

    Raises:
        ConfigError: naming every setting that differs.
    """
    precision = config.engine.precision
    asked = {
        "engine.zero_stage": config.engine.zero_stage,
        "engine.precision (weights)": "bfloat16" if precision == "bf16" else "float32",
        "engine.precision (autocast)": precision == "bf16_autocast",
        "optim.clip_grad_norm": config.optim.clip_grad_norm,
        "data.global_batch_size": config.data.global_batch_size,
        "data.micro_batch_size": config.data.micro_batch_size,
        "accumulation steps": accumulation_steps(config, world_size),
        "engine.offload.optimizer_states": config.engine.offload.optimizer_states,
        "engine.offload.parameters": config.engine.offload.parameters,
    }
    found = {
        "engine.zero_stage": int(live.zero_optimization_stage()),
        "engine.precision (weights)": str(next(live.module.parameters()).dtype).removeprefix("torch."),
        "engine.precision (autocast)": bool(live.torch_autocast_enabled()),
        "optim.clip_grad_norm": live.gradient_clipping(),
        "data.global_batch_size": live.train_batch_size(),
        "data.micro_batch_size": live.train_micro_batch_size_per_gpu(),
        "accumulation steps": live.gradient_accumulation_steps(),
        "engine.offload.optimizer_states": _optimizer_place(live.optimizer),
        "engine.offload.parameters": _parameter_place(live),
    }
    problems = tuple(
        ConfigProblem(key, f"asked {asked[key]!r}, DeepSpeed runs {found[key]!r}")
        for key in asked
        if asked[key] != found[key]
    )
    if problems:
        raise ConfigError("DeepSpeed doesn't run what was asked for:", "check engine.deepspeed_overrides", problems)


def _optimizer_place(optimizer: Any) -> str:
    if getattr(optimizer, "swap_optimizer", False):
        return "nvme"
    # Stage 3 has its own word for what stages 1 and 2 call by another.
    return "cpu" if getattr(optimizer, "offload_optimizer", getattr(optimizer, "cpu_offload", False)) else "none"


def _parameter_place(live: Any) -> str:
    if getattr(live.optimizer, "params_in_nvme_and_cpu", False):
        return "nvme"
    return "cpu" if getattr(live.optimizer, "offload_param", False) else "none"


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
