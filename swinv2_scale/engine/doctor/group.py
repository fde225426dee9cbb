"""What only all processes together can say: clocks, and how fast they exchange numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.engine.doctor.findings import Finding, Process, named, warning

#: SLURM_JOB_END_TIME is compared with this node's clock, and people compare logs.
MAX_SKEW_S = 2.0
_SIZES_MIB = (1, 16, 64)
_BUDGET_S = 9.0
_EACH_S = 0.7
_MOST_CALLS = 20


def look_at_clocks(processes: list[Process]) -> Finding:
    """Called by all ranks; the time is taken when they leave a barrier together."""
    dist.barrier()
    times = dist.gather(time.time())
    middle = statistics.median(times)
    spread = max(times) - min(times)
    off = [process for process, their in zip(processes, times, strict=True) if abs(their - middle) > MAX_SKEW_S / 2]
    if spread <= MAX_SKEW_S:
        return Finding("clocks", f"within {spread:.3f} s of each other")
    advice = "set the clocks (chrony, ntpd): a job stops in time before its end by the clock of its node"
    return warning("clocks", f"{spread:.1f} s apart: {named(off)} from the others", advice)


def measure_network() -> Finding:
    """Bus bandwidth of all-reduce and all-gather over the job's group, as nccl-tests defines it; called by all ranks.

    With n ranks and t seconds a call: all-reduce of S bytes 2 (n-1)/n S/t, all-gather of S bytes in all (n-1)/n S/t.
    Then a number means the same link speed for any n.
    """
    begun = time.monotonic()
    n = dist.world_size()
    rates: dict[str, list[str]] = {"all-reduce": [], "all-gather": []}
    expected_s = 0.0
    for mib in _SIZES_MIB:
        # What the slowest rank says counts, so that all do the same number of calls.
        left_s = _BUDGET_S - max(dist.gather(time.monotonic() - begun))
        if 4 * expected_s > left_s:
            break
        values = torch.zeros(mib * 2**20 // 4 // n * n, device=dist.device())
        part = values[: len(values) // n].clone()
        reduce_s = _seconds(partial(dist.sum_over_ranks, values))
        gather_s = _seconds(partial(dist.all_gather_into, values, part))
        rates["all-reduce"].append(f"{2 * (n - 1) / n * values.nbytes / reduce_s / 1e9:.2f}")
        rates["all-gather"].append(f"{(n - 1) / n * values.nbytes / gather_s / 1e9:.2f}")
        expected_s = (reduce_s + gather_s) * 4
    one = torch.zeros(1, device=dist.device())
    latency_s = _seconds(lambda: dist.sum_over_ranks(one))
    sizes = " / ".join(map(str, _SIZES_MIB[: len(rates["all-reduce"])]))
    text = ", ".join(f"{name} {' / '.join(rate)} GB/s" for name, rate in rates.items())
    return Finding("network", f"{text} (bus bandwidth at {sizes} MiB); one number {latency_s * 1e3:.2f} ms")


def _seconds(call: Callable[[], Tensor]) -> float:
    """Of one call, as the slowest rank sees it."""

    def timed(count: int) -> float:
        dist.barrier()
        begun = time.monotonic()
        for _ in range(count):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.monotonic() - begun) / count

    timed(1)  # connections are made, buffers allocated
    once = max(dist.gather(timed(1)))
    return max(dist.gather(timed(min(max(int(_EACH_S / once), 1), _MOST_CALLS))))
