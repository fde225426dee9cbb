"""SwinV2-G as ZeRO-3 builds it in one process, and its first values: host memory, and CPU seconds.

    .venv/bin/python benchmarks/build_giant.py > benchmarks/results/build_giant_HARDWARE_YYYYMM.md

The first stage's configuration in bf16 as the engine builds it, without the optimizer: `zero.Init`, then every first
value (float32, rounded once). Memory is VmHWM, the largest resident set of the process, everything imported included;
CPU seconds are user and system time of all threads.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from machine import describe_machine, describe_versions

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine import zero
from swinv2_scale.engine.deepspeed_config import translate
from swinv2_scale.engine.start import first_values
from swinv2_scale.tasks.simmim import SimMIMTask

REPOSITORY = Path(__file__).parents[1]
CONFIG = "configs/stages/giant/simmim_192w12.yaml"


def main() -> None:
    rows = [("imports", *now())]
    dist.start(1800)
    config = load_config(REPOSITORY / CONFIG, ["data.global_batch_size=18"]).config
    task = SimMIMTask(config)
    model = zero.build(task.build_model, translate(config, dist.world_size()))
    rows.append(("built under zero.Init, bf16", *now()))
    shapes = zero.full_shapes(model)
    zero.assign(model, first_values(model, shapes, config, None))
    rows.append(("first values", *now()))
    dist.stop()
    print("# Building SwinV2-G\n")
    print(f"- machine: {describe_machine()}; {torch.get_num_threads()} threads")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print(
        f"- configuration: {CONFIG}, {sum(s.numel() for s in shapes.values()):,} parameters, ZeRO stage 3, 1 process\n"
    )
    print("| phase | CPU s, from the start | wall s | largest resident set, GiB |\n|---|---|---|---|")
    for name, cpu_s, wall_s, gib in rows:
        print(f"| {name} | {cpu_s:.1f} | {wall_s:.1f} | {gib:.2f} |")


def now() -> tuple[float, float, float]:
    """CPU seconds, wall seconds, and the largest resident set so far in GiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    kib = int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return time.process_time(), time.perf_counter() - STARTED, kib / 2**20


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
