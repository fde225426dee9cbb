"""What it costs that glibc's malloc hands freed memory back: a SimMIM step with and without dist.keep_freed_memory().

    .venv/bin/python benchmarks/allocator.py > benchmarks/results/allocator_HARDWARE_YYYYMM.md

SwinV2-T at 192 px, window 12, batch 4, forward, backward and AdamW, one thread. Each way in processes of its own, in
turns; a process takes two steps that aren't counted, then --steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import apart, print_header, print_table
from peers import SETTINGS, Work, ours

from swinv2_scale import dist

WAYS = ("as glibc does", "kept")


def measure(way: str, backend: str, precision: str, steps: int) -> dict[str, float]:
    """Of one step, the median: seconds, of which the processor's in the kernel, and pages that had to be zeroed."""
    torch.set_num_threads(1)
    if way == "kept":
        dist.keep_freed_memory()
    setting = SETTINGS[f"simmim 192/12 {precision}"]
    work = Work(setting, "ours", lambda: ours(setting, backend), 4)
    found: dict[str, list[float]] = {"wall": [], "system": [], "faults": []}
    for step in range(steps + 2):
        before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        work.train()
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
        if step >= 2:
            found["wall"].append(wall)
            found["system"].append(after.ru_stime - before.ru_stime)
            found["faults"].append(after.ru_minflt - before.ru_minflt)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--raw", type=Path, help="a JSON file for every number")
    parser.add_argument("--case", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        way, backend, precision = options.case
        print(json.dumps(measure(way, backend, precision, options.steps)))
        return
    torch.set_num_threads(1)
    print_header("Memory that malloc keeps", ("torch",))
    print(f"- medians of {options.rounds} processes each, {options.steps} steps a process")
    rows: list[list[object]] = []
    raw: dict[str, Any] = {}
    for backend in ("eager", "fused"):
        for precision in ("fp32", "bf16"):
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    found[way].append(apart(__file__, [way, backend, precision], ["--steps", str(options.steps)]))
            raw[f"{backend} {precision}"] = found
            median = {w: {k: statistics.median(f[k] for f in found[w]) for k in found[w][0]} for w in WAYS}
            ratio = statistics.median(a["wall"] / b["wall"] for a, b in zip(*found.values(), strict=True))
            for way in WAYS:
                numbers = median[way]
                ratio_cell = f"x{ratio:.2f}" if way == "kept" else ""
                cells = (f"{numbers['wall']:.3f}", f"{numbers['system']:.3f}", f"{numbers['faults']:.0f}", ratio_cell)
                rows.append([backend, precision, way, *cells])
    print_table(("attention", "precision", "memory", "step, s", "in the kernel, s", "page faults", "faster"), rows)
    if options.raw:
        options.raw.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
