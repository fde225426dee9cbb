"""What every comparison of speed or memory here does: in turns, medians, processor and wall time, memory apart."""

from __future__ import annotations

import json
import os
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.live_memory import saved_bytes as saved_bytes
from tests.support.processes import free_port

MIB = 2**20
_TRAINING = """
model: {{variant: tiny, image_size: 192, window_size: 12, in_channels: 1}}
data:
  train: embedded:fashion-mnist/train
  shards_dir: {shards}
  global_batch_size: 2
  micro_batch_size: 1
  num_workers: 0
  pixel_mean: [0.286]
  pixel_std: [0.353]
task: {{}}
optim: {{lr: 1.0e-4, total_steps: 1000}}
engine: {{precision: fp32}}
logging: {{tensorboard: false, amplitudes_every_steps: 0, console_every_steps: 100}}
"""


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


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_bytes() -> int:
    """The most since forget_peak(): resident memory, with a GPU its allocator's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def resident_bytes() -> int:
    """Now, as peak_bytes()."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_over_base(step: Callable[[], object]) -> int:
    """Bytes of memory that a step needs above what is there before it; in a process of its own."""
    base = resident_bytes()
    forget_peak()
    step()
    return peak_bytes() - base


def rank_environments(count: int) -> list[dict[str, str]]:
    """The environment of each rank of a job on this machine, as a launcher would set it; one thread each."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def write_training(folder: Path) -> Path:
    """A configuration of SwinV2-T that needs no download; its shards go beside it."""
    path = folder / "config.yaml"
    path.write_text(_TRAINING.format(shards=folder / "shards"))
    return path


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
