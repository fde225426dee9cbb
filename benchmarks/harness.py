"""What every comparison of speed or memory here does: in turns, medians, processor and wall time, memory apart."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, describe_versions
from torch import Tensor

MIB = 2**20


@dataclass
class Times:
    """Seconds of every round, as they were measured."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads of the process

    def ratio_to(self, other: Times, of: str = "cpu") -> float:
        """How many times as long the other takes: the median over rounds, each against its own neighbour in time."""
        mine, theirs = getattr(self, of), getattr(other, of)
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))

    @property
    def summary(self) -> dict[str, float]:
        return {"wall": statistics.median(self.wall), "cpu": statistics.median(self.cpu)}


def in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """A B C, A B C, ..: what else the machine does meets all of them alike. One round before is not counted."""
    times = {name: Times() for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def kept_bytes(forward: Callable[[], object], but: Iterable[Tensor]) -> int:
    """What autograd keeps from a forward pass, each storage once, without those of ``but`` (parameters, the input)."""
    given = {x.untyped_storage().data_ptr() for x in but}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()  # alive until everything is counted: memory that is free is given out again
    total = sum(size for pointer, size in kept.items() if pointer not in given)
    del result
    return total


def peak_over_base(step: Callable[[], object]) -> int:
    """Bytes of resident memory that a step needs above what is there before it; in a process of its own."""
    base = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) - base


def apart(script: str, case: Sequence[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """Run ``script OPTIONS --case WORDS`` in a process of its own; it prints one line of JSON last."""
    words = [sys.executable, script, *options, "--case", *case]
    finished = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def print_header(title: str, packages: Sequence[str]) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU used"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"# {title}\n")
    print(f"- machine: {describe_machine(gpu)}, {capability}; {torch.get_num_threads()} thread(s)")
    print(f"- versions: {describe_versions(*packages)}")
    print(f"- command: `.venv/bin/python {' '.join([*sys.argv])}`")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
