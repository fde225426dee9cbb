"""From EngineConfig to DeepSpeed's JSON, and back: what the live engine really does must be what was asked."""

from __future__ import annotations

from typing import Any

from swinv2_scale.config.run import RunConfig
from swinv2_scale.errors import ConfigError, ConfigProblem
from swinv2_scale.plan.batch import accumulation_steps


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
        }
    result: dict[str, Any] = {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optim.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are stepped by torch's AdamW: nothing to compile
        "bf16": {"enabled": engine.precision == "bf16"},
        "steps_per_print": None,
    }
    if engine.precision == "bf16" and engine.zero_stage:
        # Micro-batches are added up in float32: the default is the model's own type. Stage 0 has no such choice
        # in DeepSpeed 0.19.8 ("unsupported mix").
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.precision == "bf16_autocast":
        # No module is "safe" to communicate in bf16: the weights are float32 and stay so between ranks.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merged(result, engine.deepspeed_overrides)


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
    }
    found = {
        "engine.zero_stage": int(live.zero_optimization_stage()),
        "engine.precision (weights)": str(next(live.module.parameters()).dtype).removeprefix("torch."),
        "engine.precision (autocast)": bool(live.torch_autocast_enabled()),
        "optim.clip_grad_norm": live.gradient_clipping(),
        "data.global_batch_size": live.train_batch_size(),
        "data.micro_batch_size": live.train_micro_batch_size_per_gpu(),
        "accumulation steps": live.gradient_accumulation_steps(),
    }
    problems = tuple(
        ConfigProblem(key, f"asked {asked[key]!r}, DeepSpeed runs {found[key]!r}")
        for key in asked
        if asked[key] != found[key]
    )
    if problems:
        raise ConfigError("DeepSpeed doesn't run what was asked for:", "check engine.deepspeed_overrides", problems)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
