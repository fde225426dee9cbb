"""How long a step takes: arithmetic at a stated rate, and what other processes make it wait for.

A model of a machine, not a measurement. Arithmetic goes at ``efficiency`` of the device's peak. A collective over P
processes moves its tensor (P - 1) / P times in and out of each (all-reduce: twice), at the rate of the slowest link on
its ring: the GPU's own inside a node, the node's network between nodes, as NCCL's multi-rail rings do; each call costs
a latency beside. Collectives that go on behind arithmetic cost what is longer than 80 % of it. Not modelled: data
loading, evaluation, checkpoints, stragglers, other jobs on the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.run import RunConfig
from swinv2_scale.plan.cost import attention_pairs, num_multiply_adds
from swinv2_scale.plan.machines import Cluster
from swinv2_scale.plan.traffic import Collective, collectives
from swinv2_scale.plan.zero import Sharding

#: Share of arithmetic that communication can go on behind. Assumed.
OVERLAP = 0.8
#: Of each collective: inside a node, and for each doubling of nodes beyond. Assumed.
LATENCY_S, LATENCY_PER_DOUBLING_S = 20e-6, 10e-6


def forward_flops(config: RunConfig) -> int:
    """Floating-point operations of one image, forward: two for each multiply-add of the backbone and the head."""
    model = config.model
    if config.task.name == "classification":
        return 2 * num_multiply_adds(model, as_published=False)
    head = math.prod(model.stage_maps[-1]) * model.stage_dims[-1] * model.stride**2 * model.in_channels
    return 2 * (num_multiply_adds(model.model_copy(update={"num_classes": 0}), as_published=False) + head)


def training_flops(config: RunConfig) -> int:
    """Of one image, forward and backward, without what is computed a second time."""
    return 3 * forward_flops(config)


def recomputed_flops(config: RunConfig) -> int:
    """What activation checkpointing computes again, and attention that keeps no scores."""
    again = forward_flops(config) if config.engine.activation_checkpointing.backend != "none" else 0
    return again + attention_again(config.model)


def attention_again(model: ModelConfig) -> int:
    """Of one image: what attention computes a second time for its backward."""
    again = 0
    for stage, dim in enumerate(model.stage_dims):
        # ``sequential`` computes attention again, ``fused`` the scores alone; ``triton`` scores and their gradients in
        # each of three kernels, for queries, keys and the bias.
        for_each_pair = {"sequential": 4 * dim, "fused": 2 * dim, "triton": 10 * dim}.get(
            model.stage_backends[stage], 0
        )
        for block in range(model.depths[stage] if for_each_pair else 0):
            again += for_each_pair * attention_pairs(model.stage_maps[stage], model.window_shape, block % 2 == 1)
    return again


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, and what follows from them.

    Attributes:
        compute_s: arithmetic of all micro-batches.
        communication_s: of all collectives, one after another.
        waiting_s: what of that nothing is computed behind.
    """

    compute_s: float
    communication_s: float
    waiting_s: float
    global_batch_size: int

    @property
    def step_s(self) -> float:
        return self.compute_s + self.waiting_s

    @property
    def images_per_s(self) -> float:
        return self.global_batch_size / self.step_s

    @property
    def scaling(self) -> float:
        """Of what the same GPUs would do without each other to wait for."""
        return self.compute_s / self.step_s


def speed(config: RunConfig, cluster: Cluster) -> Speed:
    """
    Raises:
        ConfigError: the global batch can't be dealt to so many GPUs.
    """
    sharding = Sharding.of(config, cluster.gpus)
    device = cluster.device
    tflops = device.tflops_32bit if config.engine.precision == "fp32" else device.tflops_16bit
    forward, again = forward_flops(config), recomputed_flops(config)
    rate = tflops * 1e12 * cluster.efficiency
    micro_batches = sharding.accumulation_steps
    images = micro_batches * config.data.micro_batch_size
    compute_s = images * (3 * forward + again) / rate
    backward_s = images * (2 * forward + again) / rate
    windows = {"step": compute_s, "backward": backward_s, "last backward": backward_s / micro_batches, "nothing": 0.0}
    seconds = dict.fromkeys(windows, 0.0)
    for collective in collectives(sharding):
        behind = collective.behind if config.engine.overlap_comm else "nothing"
        seconds[behind] += exchange_s(collective, cluster)
    # What goes on behind backward passes goes on beside what is gathered all the time.
    overlapped = max(seconds["step"] + seconds["backward"] - OVERLAP * windows["step"], 0.0) if seconds["step"] else 0.0
    alone = [max(seconds[name] - OVERLAP * windows[name], 0.0) for name in ("backward", "last backward")]
    waiting = seconds["nothing"] + max(overlapped, *alone)
    return Speed(compute_s, sum(seconds.values()), waiting, config.data.global_batch_size)


def exchange_s(collective: Collective, cluster: Cluster) -> float:
    """Seconds of one kind of collective in a step, if nothing else used the links."""
    in_node = collective.is_in_node or cluster.nodes == 1
    processes = cluster.gpus_per_node if in_node else cluster.gpus
    if processes == 1:
        return 0.0
    link = cluster.device.link_gb_s * 1e9
    rate = link if in_node else min(link, cluster.network_gbit_s * 1e9 / 8)
    times = 2 if collective.kind == "all_reduce" else 1
    doublings = 0.0 if in_node else math.log2(cluster.nodes)
    latency = collective.calls * (LATENCY_S + LATENCY_PER_DOUBLING_S * doublings)
    return times * collective.bytes * (processes - 1) / processes / rate + latency
