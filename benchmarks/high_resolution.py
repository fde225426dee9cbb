"""What forward, backward and update take at 192, 640 and 1536 px: peak memory and time, one image at once.

    .venv/bin/python benchmarks/high_resolution.py > benchmarks/results/high_resolution_HARDWARE_YYYYMM.md

SwinV2-T and SwinV2-S with a head of 1,000 classes, by the real engine (engine/job.build_engine) and the real step
(engine/step.train_step), ZeRO-0, one synthetic image. Five ways: eager attention; sequential attention (three copies of
--max-score-bytes at once); that with torch's activation checkpointing; and with the block inputs offloaded to host
memory, by torch and by fairscale. Without a GPU block inputs are in host memory already: these rows show what it costs.

Each case is a process of its own. Its peak is of resident memory during the steps alone (VmHWM; GPU: the allocator's),
the interpreter and its libraries included, which "before" gives. Its time is the median of --steps after a first one,
where a step takes less than a minute, and otherwise the first one. "Planned" is what `swinv2-scale plan` counts:
tensors alone. What doesn't fit --limit-gib, with a GiB for the interpreter, isn't started: a machine without swap
freezes when memory ends. What is started can't allocate more than that either.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import forget_peak, peak_bytes, resident_bytes
from machine import describe_machine, describe_versions

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.step import train_step
from swinv2_scale.plan.fit import Memory
from swinv2_scale.plan.peak import activations
from swinv2_scale.plan.zero import Sharding, states
from swinv2_scale.tasks.classification import ClassificationTask

MODELS = ("tiny", "small")
SIZES = ((192, 12), (640, 40), (1536, 32), (1536, 48))
_SCORES = "model.attention.max_score_bytes"
_CHECKPOINTING = "engine.activation_checkpointing"
WAYS = {
    "eager": ("model.attention.backend=eager",),
    "sequential": ("model.attention.backend=sequential",),
    "sequential, checkpointed": ("model.attention.backend=sequential", f"{_CHECKPOINTING}.backend=torch"),
    "the same, offloaded (torch)": (
        *("model.attention.backend=sequential", f"{_CHECKPOINTING}.backend=torch"),
        f"{_CHECKPOINTING}.offload=true",
    ),
    "the same, offloaded (fairscale)": (
        *("model.attention.backend=sequential", f"{_CHECKPOINTING}.backend=fairscale"),
        f"{_CHECKPOINTING}.offload=true",
    ),
}
CONFIG = """
model: {variant: tiny, num_classes: 1000}
data: {train: none, global_batch_size: 1, micro_batch_size: 1, num_workers: 0}
task: {name: classification}
optim: {lr: 1.0e-4, total_steps: 10}
engine: {zero_stage: 0, precision: fp32}
"""
_GIB = 2**30
_LONG_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--max-score-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--sizes", nargs="+", default=[f"{size}/{window}" for size, window in SIZES])
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(load(arguments.case), arguments.limit_gib, arguments.steps)
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU used"
    print("# High resolution on small memory\n")
    print(f"- machine: {describe_machine(gpu)}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'fairscale')}")
    print(f"- command: `.venv/bin/python benchmarks/high_resolution.py {shlex.join(sys.argv[1:])}`")
    print(f"- {arguments.precision}, one image, a process may have {arguments.limit_gib:g} GiB\n")
    print("| model | px / window | way | before, GiB | peak, GiB | planned, GiB | s a step |")
    print("|---|---|---|---|---|---|---|")
    for model, size, way in product(arguments.models, arguments.sizes, arguments.ways):
        px, window = size.split("/")
        case = [f"model.variant={model}", f"model.image_size={px}", f"model.window_size={window}", *WAYS[way]]
        case += [f"engine.precision={arguments.precision}", f"{_SCORES}={arguments.max_score_bytes}"]
        row = run(case, arguments)
        print(f"| {model} | {px} / {window} | {way} | {row} |", flush=True)


def load(overrides: list[str]) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.yaml"
        path.write_text(CONFIG)
        return load_config(path, overrides).config


def planned_bytes(config: RunConfig) -> int:
    found = activations(config, "cuda" if torch.cuda.is_available() else "cpu")
    return Memory(states(Sharding.of(config, 1)), found).tensors


def run(case: list[str], arguments: argparse.Namespace) -> str:
    """The last columns of a row; the case in a process of its own."""
    planned = planned_bytes(load(case))
    if planned + _GIB > arguments.limit_gib * _GIB:
        return f"- | not started | {planned / _GIB:.2f} | - "
    command = [sys.executable, __file__, "--limit-gib", str(arguments.limit_gib), "--steps", str(arguments.steps)]
    finished = subprocess.run([*command, "--case", *case], stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        return f"- | did not fit or failed ({finished.returncode}) | {planned / _GIB:.2f} | - "
    found = json.loads(finished.stdout.splitlines()[-1])
    return f"{found['before']:.2f} | {found['peak']:.2f} | {planned / _GIB:.2f} | {found['seconds']:.2f}"


def measure(config: RunConfig, limit_gib: float, steps: int) -> None:
    dist.start(600)
    task = ClassificationTask(config)
    engine = build_engine(config, task)
    before = resident_bytes()
    if not torch.cuda.is_available():
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = addresses - before + int(limit_gib * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    images = torch.randint(0, 256, (1, 3, *config.model.image_shape), dtype=torch.uint8)
    batch = Batch({"images": images, "labels": torch.tensor([7]), "drop_keys": torch.arange(1)}, digest=0)
    forget_peak()
    seconds: list[float] = []
    while len(seconds) < 1 + steps and (not seconds or seconds[0] < _LONG_S):
        started = time.perf_counter()
        result = train_step(engine, task, [batch], 1e-4, lambda loss, grad_norm: True)
        assert result.is_applied
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found: dict[str, Any] = {"before": before / _GIB, "peak": peak_bytes() / _GIB}
    print(json.dumps({**found, "seconds": statistics.median(seconds[1:] or seconds)}))
    dist.stop()


if __name__ == "__main__":
    main()
