"""ZeRO as DeepSpeed 0.19.8 does it: what each process holds of weights, masters, moments and gradients, in bytes.

tests/distributed/test_plan.py compares these numbers with the tensors of live engines.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from swinv2_scale.config.run import RunConfig
from swinv2_scale.plan.batch import accumulation_steps
from swinv2_scale.plan.parameters import Shape, parameter_groups, run_parameters

_WIDE = 4
#: DeepSpeed's own, for what a configuration doesn't set (``engine.deepspeed_overrides`` may).
_DEFAULTS = {"stage3_max_reuse_distance": 10**9, "sub_group_size": 10**9, "zero_hpz_partition_size": 1}
#: Stage 0 (and 1 in bf16) reduces gradients in pieces of so many elements (MEMORY_OPT_ALLREDUCE_SIZE).
_FALLBACK_BUCKET = 500_000_000


@dataclass(frozen=True)
class Sharding:
    """The parameters of a run, dealt to processes.

    Attributes:
        shapes: of every parameter, by name.
        world_size: processes.
    """

    config: RunConfig
    shapes: dict[str, Shape]
    world_size: int

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Sharding:
        return cls(config, run_parameters(config), world_size)

    @property
    def stage(self) -> int:
        return self.config.engine.zero_stage

    @property
    def numel(self) -> int:
        """Numbers of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def weight_width(self) -> int:
        """Bytes of a weight, and of a gradient where it is computed and sent."""
        return 2 if self.config.engine.precision == "bf16" else _WIDE

    @property
    def padded(self) -> int:
        """Numbers with the padding that lets every process have as many: each group's, or at stage 3 each one's."""
        if self.stage == 0:
            return self.numel
        if self.stage == 3:
            return sum(-(-math.prod(shape) // self.world_size) for shape in self.shapes.values()) * self.world_size
        unit = 2 * self.world_size  # 4 bytes of two bf16 numbers, for NCCL
        groups = parameter_groups(self.shapes, self.config.optim.layer_decay < 1)
        sizes = (sum(math.prod(self.shapes[name]) for name in group.names) for group in groups)
        return sum(-(-size // unit) * unit for size in sizes)

    @property
    def part(self) -> int:
        """Numbers whose masters and moments one process holds."""
        return self.padded if self.stage == 0 else self.padded // self.world_size

    @property
    def persistent(self) -> int:
        """Stage 3: numbers of the small parameters that every process keeps whole."""
        limit = self.config.engine.param_persistence_elements
        return sum(n for shape in self.shapes.values() if (n := math.prod(shape)) <= limit)

    @property
    def live(self) -> int:
        """Stage 3: numbers that are whole on a process at once: DeepSpeed gathers ahead until it has so many, and
        keeps what is used again soon. Up to a billion by default: all of B, a third of G. A block is whole or not.
        """
        reuse = self.override("stage3_max_reuse_distance") // (2 + self.is_recomputing)
        limit = max(self.config.engine.max_live_elements, reuse, self.largest_block)
        return min(self.numel, limit + self.persistent)

    @property
    def largest_block(self) -> int:
        """Numbers of the largest Swin block."""
        sizes: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            stage, _, rest = name.rpartition(".blocks.")
            if stage:
                sizes[f"{stage} {rest.partition('.')[0]}"] += math.prod(shape)
        return max(sizes.values())

    @property
    def parameter_buffers(self) -> tuple[int, int]:
        """(count, numbers of each): what parameters are read from files into, as many as can be whole at once."""
        swapped = sorted(n for shape in self.shapes.values() if (n := math.prod(shape)) >= self._least_swapped)
        room = self.live + self.config.engine.prefetch_bucket_elements
        count = sum(1 for total in accumulate(swapped) if total <= room)
        return max(count, 1), -(-max(swapped, default=1) // self.world_size)

    @property
    def _least_swapped(self) -> int:
        """Numbers of the smallest parameter that is swapped: DeepSpeed keeps parts of less than 1 MiB in memory."""
        return 2**20 // self.weight_width * self.world_size

    @property
    def is_recomputing(self) -> bool:
        return self.config.engine.activation_checkpointing.backend != "none"

    @property
    def num_moments(self) -> int:
        """Adam's two, and the moving average."""
        return 2 + (self.config.optim.ema_decay is not None)

    @property
    def sum_width(self) -> int:
        """Bytes of a number where the gradients of micro-batches are added up; stage 0 has no choice in DeepSpeed.

        Where memory is so short that states are offloaded, one micro-batch's gradients aren't widened for nothing.
        """
        adds_nothing = self.stage == 3 and self.steps_on_host and self.accumulation_steps == 1
        return self.weight_width if self.stage == 0 or adds_nothing else _WIDE

    @property
    def largest_sub_group(self) -> int:
        """Numbers of the most that one process updates at once from files (engine.offload.sub_group_elements)."""
        largest = 0
        for group in parameter_groups(self.shapes, self.config.optim.layer_decay < 1):
            numel = 0
            for name in group.names:
                numel += -(-math.prod(self.shapes[name]) // self.world_size)
                largest = max(largest, numel)
                if numel >= self.config.engine.offload.sub_group_elements:
                    numel = 0
        return largest

    @property
    def accumulation_steps(self) -> int:
        return accumulation_steps(self.config, self.world_size)

    def override(self, key: str) -> int:
        """A number of DeepSpeed's ZeRO section, as overridden or by default."""
        return int(_overrides(self.config).get(key, _DEFAULTS[key]))

    @property
    def steps_on_host(self) -> bool:
        return self.config.engine.offload.optimizer_states != "none"


@dataclass(frozen=True)
class States:
    """Bytes that one process holds.

    Attributes:
        weights: that the model computes with; a part of each at stage 3.
        masters: float32 copies of the part that this process updates; 0 where weights are float32 and whole.
        moments: of AdamW, and the moving average.
        gradients: at the end of backward, summed over micro-batches.
        gathered: stage 3: parameters that are whole for a while (or always, where they are small).
        buckets: gradients on their way to other processes.
        update: what reducing and updating needs beside them, when activations are gone.
        host: of all these, what lies in host memory instead; with the buffers that files are read into.
        disk: what lies in files of the node instead.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int
    buckets: int
    update: int
    host: int = 0
    disk: int = 0

    @property
    def static(self) -> int:
        """There from the first update to the last."""
        return self.weights + self.masters + self.moments


def states(sharding: Sharding) -> States:
    """What one process holds of a run's states."""
    part, numel, width = sharding.part, sharding.numel, sharding.weight_width
    has_masters = sharding.stage > 0 or width < _WIDE
    masters, moments = part * _WIDE * has_masters, part * _WIDE * sharding.num_moments
    weights = part * width if sharding.stage == 3 else sharding.padded * width
    gradients, update = _gradients(sharding)
    gathered = sharding.live * width if sharding.stage == 3 else 0
    if sharding.stage == 3 and (hpz := sharding.override("zero_hpz_partition_size")) > 1:
        gathered += numel * width // hpz  # a second copy, shared by the processes of a node
    found = States(weights, masters, moments, gradients, gathered, _buckets(sharding), update)
    return _parameters_elsewhere(sharding, _optimizer_elsewhere(sharding, found))


def _optimizer_elsewhere(sharding: Sharding, on_gpu: States) -> States:
    """Gradients follow the masters: float32 ones for the update, and at stage 3 their sums too."""
    if not sharding.steps_on_host:
        return on_gpu
    moved = on_gpu.masters + on_gpu.moments + sharding.part * _WIDE
    found = replace(on_gpu, masters=0, moments=0)
    if sharding.stage < 3:
        return replace(found, host=moved)
    found = replace(found, gradients=0, update=0, host=sharding.part * sharding.sum_width)
    if sharding.config.engine.offload.optimizer_states == "cpu":
        return replace(found, host=found.host + moved)
    buffers = (2 + sharding.num_moments) * sharding.largest_sub_group * _WIDE
    return replace(found, host=found.host + buffers, disk=moved)


def _parameters_elsewhere(sharding: Sharding, found: States) -> States:
    place = sharding.config.engine.offload.parameters
    if place == "none":
        return found
    if place == "cpu":
        return replace(found, weights=0, host=found.host + found.weights)
    count, elements = sharding.parameter_buffers
    host = found.host + count * elements * sharding.weight_width
    return replace(found, weights=0, host=host, disk=found.disk + found.weights)


def checkpoint_bytes(sharding: Sharding) -> tuple[int, int]:
    """(all files together, the largest that one process writes): which is also its copy in host memory while it does.

    Stage 3 writes masters and moments alone; below, process 0 writes the weights too.
    """
    part_bytes = sharding.part * _WIDE * sharding.num_moments
    whole = sharding.numel * sharding.weight_width
    if sharding.stage == 0:
        masters = sharding.numel * _WIDE if sharding.weight_width < _WIDE else 0
        return whole + masters + part_bytes, whole + masters + part_bytes
    part_bytes += sharding.part * _WIDE
    if sharding.stage == 3:
        return part_bytes * sharding.world_size, part_bytes
    return part_bytes * sharding.world_size + whole, part_bytes + whole


def _gradients(sharding: Sharding) -> tuple[int, int]:
    """(gradients at the end of backward, room for the update beside them)."""
    part, numel, width = sharding.part, sharding.numel, sharding.weight_width
    is_bf16 = width < _WIDE
    if sharding.stage == 0:  # reduced in flat pieces; when they are gone, in bf16 the update reads float32 copies
        return numel * width, max(min(numel, _FALLBACK_BUCKET) * width, numel * _WIDE * is_bf16)
    if sharding.stage == 1 and is_bf16 and not sharding.steps_on_host:
        # DeepSpeed's BF16_Optimizer: bf16 ones, and a float32 sum of all on every process, which are reduced in bf16.
        # Two groups that fit one piece are copied side by side first.
        padded, is_copied = sharding.padded, numel <= _FALLBACK_BUCKET
        return padded * (width + _WIDE), padded * (width + _WIDE * is_copied)
    if sharding.stage == 1:  # whole until the last micro-batch has been added
        return numel * width if sharding.accumulation_steps > 1 else part * _WIDE, part * _WIDE
    if sharding.stage == 2:
        return part * _WIDE, 0 if is_bf16 else part * _WIDE
    return part * _WIDE, min(part, sharding.override("sub_group_size")) * _WIDE


def _buckets(sharding: Sharding) -> int:
    """Allocated whole while backward goes on (stage 3: always), whatever the model's size."""
    engine, width = sharding.config.engine, sharding.weight_width
    bucket = engine.reduce_bucket_elements * width
    if sharding.stage == 3:
        return bucket + min(engine.reduce_bucket_elements, sharding.numel) * width  # and a copy sorted by process
    if sharding.stage == 2 or (sharding.stage == 1 and width == _WIDE):
        return bucket * (1 + engine.overlap_comm)
    return 0


def _overrides(config: RunConfig) -> dict[str, Any]:
    section: dict[str, Any] = config.engine.deepspeed_overrides.get("zero_optimization", {})
    return section
