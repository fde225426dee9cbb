"""Contenders side by side: interleaved in one process, medians and ratios, CPU seconds and wall; memory of each alone.

A machine is never quiet: whoever runs first or alone has another machine than the others. So every round runs each
contender once, in turn, and what counts is the ratio of medians of one run.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from giant_step import forget_peak, peak_bytes
from torch import Tensor, nn

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Of one contender, a value a round.

    Attributes:
        cpu: seconds of all threads together.
    """

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def interleaved(contenders: dict[str, Step], rounds: int, warmups: int = 1) -> dict[str, Times]:
    """Run each contender once a round; the first rounds are forgotten."""
    times = {name: Times([], []) for name in contenders}
    for number in range(warmups + rounds):
        for name, step in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= warmups:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def kept_bytes(forward: Step, parameters: Iterable[nn.Parameter]) -> int:
    """What a forward keeps for its backward: storages once each, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        result = forward()  # alive, so that no two storages have one address
    total = sum(found.values())
    del result
    return total


def step_peak_bytes(step: Step) -> int:
    """How far a step raises the process's resident memory; the second step, after all that stays is allocated."""
    step()
    gc.collect()
    forget_peak()
    before = peak_bytes()
    step()
    return peak_bytes() - before


def in_its_own_process(script: str, words: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a script once more with other words; the last line that it prints is JSON.

    Returns:
        That, or ``{"failed": why}``.
    """
    try:
        command = [sys.executable, script, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def write_json(path: Path, **facts: Any) -> None:
    """The raw numbers, every round."""
    path.write_text(json.dumps(facts, indent=1, default=asdict) + "\n")
