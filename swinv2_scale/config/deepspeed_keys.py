"""The DeepSpeed settings that ``engine.deepspeed_overrides`` accepts.

DeepSpeed 0.19.8 takes misspelled keys without a word, so they are listed. A contract test compares the list with the
installed DeepSpeed's own field names.
"""

from __future__ import annotations

#: Set by a typed key of ours; giving them twice would make two truths.
OWNED_BY_CONFIG: dict[str, str] = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.global_batch_size and data.micro_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.reduce_bucket_size": "engine.reduce_bucket_elements",
    "zero_optimization.stage3_prefetch_bucket_size": "engine.prefetch_bucket_elements",
    "zero_optimization.stage3_param_persistence_threshold": "engine.param_persistence_elements",
    "zero_optimization.stage3_max_live_parameters": "engine.max_live_elements",
    "zero_optimization.offload_optimizer": "engine.offload.optimizer_states",
    "zero_optimization.offload_param": "engine.offload.parameters",
}

#: Fields of DeepSpeed's ZeRO section, under the names that a configuration file uses.
ZERO_KEYS: tuple[str, ...] = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_weights",
)
TOP_KEYS = ("communication_data_type", "memory_breakdown", "prescale_gradients", "wall_clock_breakdown")

DEEPSPEED_KEYS: tuple[str, ...] = (*TOP_KEYS, *(f"zero_optimization.{key}" for key in ZERO_KEYS))
