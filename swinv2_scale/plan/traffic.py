"""What the processes of a run send each other in a step.

Volumes are those of DeepSpeed 0.19.8, as its collectives were counted on live engines (tests/distributed/test_plan.py),
which differ from the ZeRO paper's (arXiv 1910.02054, sec. 7) where DeepSpeed does: stages 1 and 2 add gradients up by
all-reduce (``use_multi_rank_bucket_allreduce``), stage 2 does so after every micro-batch, and stage 3 gathers a
parameter once or twice a micro-batch, as it could keep it meanwhile. hpZ is ZeRO++'s (arXiv 2306.10209, sec. 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swinv2_scale.plan.zero import Sharding

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
#: What of a step's work a collective can go on behind: all of it, backward passes, or nothing.
Behind = Literal["step", "backward", "last backward", "nothing"]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange.

    Attributes:
        bytes: of the whole tensor, times its repetitions in a step.
        calls: how many exchanges that is.
        is_in_node: between the processes of a node alone.
    """

    what: str
    kind: Kind
    bytes: int
    calls: int
    behind: Behind
    is_in_node: bool = False


def gathers_per_micro_batch(sharding: Sharding) -> float:
    """Stage 3: how often a parameter is gathered for one forward and backward, on average.

    Once for forward, and again for backward (recomputation included, which comes just before) unless it could stay:
    DeepSpeed keeps ``max_live_elements`` of them whole.
    """
    return 2 - sharding.live / sharding.numel


def collectives(sharding: Sharding) -> list[Collective]:
    """All that is exchanged in one step."""
    stage, times = sharding.stage, sharding.accumulation_steps
    bytes_once = sharding.numel * sharding.weight_width
    bucket = min(sharding.config.engine.reduce_bucket_elements, sharding.numel)
    pieces = -(-sharding.numel // bucket)
    if stage == 3:
        return [*_gathers(sharding), _of("gradients", "reduce_scatter", bytes_once, pieces, times, "backward")]
    if stage == 0:
        return [_of("gradients", "all_reduce", bytes_once, pieces, 1, "nothing")]
    weights = _of("updated weights", "all_gather", bytes_once, pieces, 1, "nothing")
    if stage == 2:
        return [_of("gradients", "all_reduce", bytes_once, pieces, times, "backward"), weights]
    # bf16 sums are reduced when the last backward is over, by DeepSpeed's BF16_Optimizer.
    behind: Behind = "nothing" if sharding.weight_width == 2 else "last backward"
    return [_of("gradients", "all_reduce", bytes_once, pieces, 1, behind), weights]


def _gathers(sharding: Sharding) -> list[Collective]:
    gathers = gathers_per_micro_batch(sharding) * sharding.accumulation_steps
    bytes_once = (sharding.numel - sharding.persistent) * sharding.weight_width
    # One for each of a block's four matrices at least, and for what is gathered ahead at once.
    calls = max(4 * sum(sharding.config.model.depths), sharding.numel // _at_once(sharding))
    if sharding.override("zero_hpz_partition_size") <= 1:
        return [_of("weights", "all_gather", bytes_once, calls, gathers, "step")]
    first = _of("weights, once a step", "all_gather", bytes_once, calls, 1, "step")
    others = round(bytes_once * (gathers - 1))
    within = Collective("weights, in the node", "all_gather", others, round(calls * (gathers - 1)), "step", True)
    return [first, within]


def _at_once(sharding: Sharding) -> int:
    return max(1, sharding.config.engine.prefetch_bucket_elements)


def _of(what: str, kind: Kind, once: int, calls: int, times: float, behind: Behind) -> Collective:
    return Collective(what, kind, round(once * times), round(calls * times), behind)
