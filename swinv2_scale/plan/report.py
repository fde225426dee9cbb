"""Everything that a plan says, as plain data: for tables, JSON and scripts."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from swinv2_scale.config.run import RunConfig
from swinv2_scale.plan import speed as speeds
from swinv2_scale.plan.batch import accumulation_steps
from swinv2_scale.plan.cost import num_parameters
from swinv2_scale.plan.fit import (
    FRAGMENTATION,
    RESERVED_BYTES,
    changed,
    largest_micro_batch,
    memory,
    unfit,
    ways_to_fit,
)
from swinv2_scale.plan.machines import Cluster
from swinv2_scale.plan.peak import activations
from swinv2_scale.plan.traffic import collectives
from swinv2_scale.plan.zero import Sharding, checkpoint_bytes

SECONDS_A_DAY = 86400


def predicted_peak_bytes(config: RunConfig, gpus: int = 1) -> int:
    """What ``torch.cuda.max_memory_allocated`` should come to on each GPU of a run: tensors alone, without the
    allocator's rounding, CUDA's context and NCCL.

    Raises:
        ConfigError: the global batch can't be dealt to so many GPUs.
    """
    return memory(config, gpus).tensors


def make_plan(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """
    Raises:
        ConfigError: a batch or a number of processes that doesn't fit together.
    """
    if problem := unfit(config, cluster):
        raise problem
    sharding = Sharding.of(config, cluster.gpus)
    micro_batches = accumulation_steps(config, cluster.gpus)
    backbone = num_parameters(config.model)
    total, largest = checkpoint_bytes(sharding)
    optim, batch = config.optim, config.data.global_batch_size
    found = speeds.speed(config, cluster)
    return {
        "cluster": {**asdict(cluster), "gpus_per_node": cluster.gpus_per_node},
        "parameters": {"total": sharding.numel, "backbone": backbone, "task": sharding.numel - backbone},
        "schedule": {
            "steps": optim.total_steps,
            "global_batch_size": batch,
            "micro_batch_size": config.data.micro_batch_size,
            "micro_batches": micro_batches,
            "images": optim.total_steps * batch,
        },
        "memory": memory_of(config, cluster),
        "activations": activation_choices(config),
        "zero": zero_stages(config, cluster),
        "checkpoint": {
            "bytes": total,
            "largest_of_a_process": largest,
            "saves": math.ceil(optim.total_steps / config.checkpoint.every_steps),
            "hours_between": config.checkpoint.every_steps * found.step_s / 3600,
        },
        "flops": {
            "forward": speeds.forward_flops(config),
            "training": speeds.training_flops(config),
            "recomputed": speeds.recomputed_flops(config),
        },
        "traffic": [{**asdict(item), "seconds": speeds.exchange_s(item, cluster)} for item in collectives(sharding)],
        "speed": {
            "step_s": found.step_s,
            "compute_s": found.compute_s,
            "communication_s": found.communication_s,
            "waiting_s": found.waiting_s,
            "images_per_s": found.images_per_s,
            "days": optim.total_steps * found.step_s / SECONDS_A_DAY,
        },
        "changes": [asdict(change) for change in ways_to_fit(config, cluster)],
        "largest_micro_batch": largest_micro_batch(config, cluster),
        "assumptions": assumptions(cluster),
    }


def memory_of(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Of one GPU, as configured."""
    found, sharding = memory(config, cluster.gpus), Sharding.of(config, cluster.gpus)
    return {
        **asdict(found.states),
        "always_whole": sharding.persistent * sharding.weight_width if sharding.stage == 3 else 0,
        "activations_kept": found.activations.kept,
        "activations_peak": found.activations.peak,
        "largest_scores": found.activations.largest_scores,
        "activations_on_host": found.activations.host,
        "tensors": found.tensors,
        "total": found.total,
        "limit": cluster.device.memory_bytes,
        "fits": found.total <= cluster.device.memory_bytes,
    }


def activation_choices(config: RunConfig) -> list[dict[str, Any]]:
    """Activations of one micro-batch with and without checkpointing, for each kind of attention and as configured."""
    rows: list[dict[str, Any]] = []
    is_checkpointing = config.engine.activation_checkpointing.backend != "none"
    for backend in ("none", "torch"):
        for attention in (config.model.attention.backend, "eager", "sequential"):
            settings: dict[str, Any] = {"engine.activation_checkpointing.backend": backend}
            settings |= {"engine.activation_checkpointing.offload": False, "model.attention.backend": attention}
            found = activations(changed(config, settings))
            is_configured = attention is config.model.attention.backend and is_checkpointing == (backend != "none")
            name = attention if isinstance(attention, str) else "/".join(attention)
            row = {"checkpointing": backend, "attention": name, "is_configured": is_configured, **asdict(found)}
            if all((row["checkpointing"], row["attention"]) != (r["checkpointing"], r["attention"]) for r in rows):
                rows.append(row)
    return rows


def zero_stages(config: RunConfig, cluster: Cluster) -> list[dict[str, Any]]:
    """Memory and speed of the same run at every ZeRO stage, and at stage 3 with gathers inside the node."""
    rows = []
    hpz = "engine.deepspeed_overrides.zero_optimization.zero_hpz_partition_size"
    configured = Sharding.of(config, cluster.gpus).override("zero_hpz_partition_size") > 1
    for stage, is_hpz in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        if is_hpz and (cluster.nodes == 1 or cluster.gpus_per_node == 1):
            continue
        settings = {"engine.zero_stage": stage, hpz: cluster.gpus_per_node if is_hpz else 1}
        attempt = changed(config, settings)
        found, rate = memory(attempt, cluster.gpus), speeds.speed(attempt, cluster)
        s = found.states
        rows.append(
            {
                "stage": stage,
                "hpz": is_hpz,
                "is_configured": stage == config.engine.zero_stage and is_hpz == (configured and stage == 3),
                "weights": s.weights,
                "masters_and_moments": s.masters + s.moments,
                "gradients": s.gradients,
                "gathered_and_buckets": s.gathered + s.buckets,
                "total": found.total,
                "fits": found.total <= cluster.device.memory_bytes,
                "images_per_s": rate.images_per_s,
                "scaling": rate.scaling,
                "days": config.optim.total_steps * rate.step_s / SECONDS_A_DAY,
            }
        )
    return rows


def assumptions(cluster: Cluster) -> list[str]:
    """What the figures rest on that isn't counted."""
    device = cluster.device
    return [
        f"arithmetic at {cluster.efficiency:.0%} of {device.tflops_16bit:g} TFLOP/s (float32: {device.tflops_32bit:g}),"
        " what is recomputed included; assumed: measure yours with benchmarks/gpu.py",
        f"{device.link_gb_s:g} GB/s each way between GPUs of a node, {cluster.network_gbit_s:g} Gbit/s for a node; "
        f"{speeds.LATENCY_S * 1e6:g} us a collective, {speeds.LATENCY_PER_DOUBLING_S * 1e6:g} more for each doubling "
        f"of nodes; up to {speeds.OVERLAP:.0%} of arithmetic hides communication",
        f"{RESERVED_BYTES / 2**30:.1f} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} of tensors lost to fragmentation",
        "no time for data loading, offloading, evaluation, checkpoints, restarts and waiting for slower machines",
    ]
