"""What one GPU does with SimMIM: images a second, MFU, and the peak memory of its allocator.

    .venv/bin/python benchmarks/gpu.py > benchmarks/results/gpu_HARDWARE_YYYYMM.md

Tiny, base and giant at 192 px (configs/stages/), ZeRO 1 and 3, each attention backend, with activation checkpointing
and without: the configured case of every model first, then the giant with large micro-batches, and at 1536 px with
window 48, then the variations. Each case is a process of its own with a time
limit; one that fails is a row that says how. After "out of memory" the same case comes again with half the micro-batch.
Rows are printed as they come, so what a total --budget-s cuts off is the end. Where no wheels can be fetched:
benchmarks/wheelhouse.sh.

A case is the real engine (engine/job.build_engine) and the real step (engine/step.train_step: forward, backward,
clipping, AdamW, the checks before an update), one process, no accumulation. Its batch is synthetic and stays in
(pinned) host memory: no shards, no decoding. Its weights are random numbers: SwinV2-G's first values take minutes, and
speed does not depend on them. MFU is what swinv2_scale/plan/speed.py counts for forward and backward, not for what
is computed a second time, against the device's peak in swinv2_scale/plan/machines.py or --peak-tflops. "Planned" is
what `swinv2-scale plan` says about "peak": the tensors of a GPU, so a CPU's resident memory is not to be compared.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, describe_versions

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch
from swinv2_scale.draws import Draw
from swinv2_scale.engine import zero
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.step import train_step
from swinv2_scale.errors import ConfigError
from swinv2_scale.plan.machines import DEVICES
from swinv2_scale.plan.report import predicted_peak_bytes
from swinv2_scale.plan.speed import training_flops
from swinv2_scale.tasks.simmim import SimMIMTask, draw_hidden
from swinv2_scale.telemetry.metrics import peak_memory_bytes

REPOSITORY = Path(__file__).parents[1]
CONFIGS = {
    "tiny": "configs/stages/tiny/simmim_192w12.yaml",
    "base": "configs/stages/base/simmim_192w12.yaml",
    "giant": "configs/stages/giant/simmim_192w12.yaml",
}
#: The attention of those files: sequential in the first two stages, as in the paper's sec. 3.5.
CONFIGURED = "configured"
COLUMNS = (
    *("model", "ZeRO", "attention", "checkpointing", "micro-batch", "s a step", "images/s", "MFU"),
    *("peak GiB", "planned GiB", "reserved GiB"),
)
#: A model that a CPU trains in seconds, for --smoke.
SMALL = (
    *("model.embed_dim=16", "model.depths=[1,1]", "model.num_heads=[2,4]"),
    *("task.mask_patch_size=8", "task.target_norm_window=0"),
    *("data.global_batch_size=2", "data.micro_batch_size=2"),
    *("engine.reduce_bucket_elements=1_000_000", "engine.prefetch_bucket_elements=10_000"),
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    zero_stage: int
    attention: str = CONFIGURED
    checkpointing: str = "torch"
    micro_batch: int = 0  # 0: the configuration's own
    is_small: bool = False
    side: int = 192
    window: int = 12

    @property
    def overrides(self) -> list[str]:
        found = [f"engine.zero_stage={self.zero_stage}"]
        found += [f"model.image_size={self.side}", f"model.window_size={self.window}"]
        found.append(f"engine.activation_checkpointing.backend={self.checkpointing}")
        if self.attention != CONFIGURED or self.is_small:
            found.append(f"model.attention.backend={'eager' if self.is_small else self.attention}")
        return [*found, *(SMALL if self.is_small else ())]

    def config(self, extra: list[str]) -> RunConfig:
        path = REPOSITORY / CONFIGS[self.model]
        own = load_config(path, [*self.overrides, *extra]).config
        size = self.micro_batch or own.data.micro_batch_size
        sizes = [f"data.global_batch_size={size}", f"data.micro_batch_size={size}"]
        return load_config(path, [*self.overrides, *extra, *sizes]).config


#: Its micro-batch is an override, which an override on the command line replaces.
SMOKE = Case("tiny", 3, is_small=True, side=32, window=4)


def cases(models: list[str]) -> list[Case]:
    """What matters most comes first."""
    configured = [Case(model, stage) for model in models for stage in (1, 3)]
    if "giant" in models:
        configured += [Case("giant", 1, "triton", how, size) for how, size in (("torch", 128), ("none", 64))]
        configured += [Case("giant", 1, name, micro_batch=1, side=1536, window=48) for name in ("triton", CONFIGURED)]
    backends = (CONFIGURED, "triton", "eager", "sequential", "sdpa")
    variations = [
        Case(model, stage, attention, checkpointing)
        for stage in (1, 3)
        for model in models
        for attention in backends
        for checkpointing in ("torch", "none")
    ]
    return list(dict.fromkeys(configured + variations))


# In the parent


def main() -> None:
    arguments = parse()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)), arguments.steps, arguments.overrides)))
        return
    gpu = describe_gpu()
    print("# SimMIM on one device\n" if not arguments.smoke else "# Smoke test, no benchmark\n")
    print(f"- machine: {describe_machine(gpu)}")
    print(
        f"- versions: {describe_versions('torch', 'deepspeed')}, CUDA or HIP {torch.version.cuda or torch.version.hip}"
    )
    print(f"- command: `.venv/bin/python benchmarks/gpu.py {' '.join(sys.argv[1:])}`")
    print(f"- {arguments.steps} timed steps a case after 3 that are not; one process; seconds are medians\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    wanted = [SMOKE] if arguments.smoke else cases(arguments.models)
    left = run_all(wanted, arguments)
    print(f"\n{left} cases were left out: the budget of {arguments.budget_s} s was spent." if left else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--case-s", type=float, default=150, help="the most seconds that one case may take")
    parser.add_argument("--budget-s", type=float, default=3000, help="no case starts that could end after so many")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16, of a GPU that is not in plan/machines.py")
    parser.add_argument("--smoke", action="store_true", help="one tiny case, also on a CPU: does it run at all?")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for all cases, after `--`")
    return parser.parse_args()


def run_all(wanted: list[Case], arguments: argparse.Namespace) -> int:
    """Print a row for each case, as it ends; how many there was no time for."""
    end = time.monotonic() + arguments.budget_s
    for number, case in enumerate(wanted):
        for result, tried in attempts(case, arguments, end):
            print(row(tried, result, arguments.peak_tflops), flush=True)
        if time.monotonic() + arguments.case_s > end:
            return len(wanted) - number - 1
    return 0


def attempts(case: Case, arguments: argparse.Namespace, end: float) -> Iterator[tuple[dict[str, Any], Case]]:
    """With half the micro-batch again, for as long as memory is short."""
    while True:
        result = in_process(case, arguments)
        yield result, case
        size = result.get("micro_batch", 0) // 2
        if result.get("failed") != "out of memory" or size == 0 or time.monotonic() + arguments.case_s > end:
            return
        case = replace(case, micro_batch=size)


def in_process(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What measure() returned in a process of its own, or what became of that process."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--steps", str(arguments.steps)]
    try:
        done = subprocess.run(
            [*command, "--", *arguments.overrides], capture_output=True, text=True, timeout=arguments.case_s
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {arguments.case_s:.0f} s"}
    if done.returncode < 0:
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": last[:120].replace("|", "/")}
    found: dict[str, Any] = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line[:1] == "{"))
    return found


def row(case: Case, result: dict[str, Any], peak_tflops: float | None) -> str:
    size = result.get("micro_batch") or case.micro_batch or "configured"
    model = f"{case.model} {case.side}/{case.window}"
    names = f"| {model} | {case.zero_stage} | {case.attention} | {case.checkpointing} | {size} "
    if "failed" in result:
        return f"{names}| {result['failed']} | | | | | |"
    peak = peak_tflops or known_peak(result["device"])
    rate = result["micro_batch"] / result["step_s"]
    mfu = f"{result['flops'] * rate / (peak * 1e12):.1%}" if peak else ""
    memory = " | ".join(f"{result[f'{name}_bytes'] / 2**30:.2f}" for name in ("peak", "planned", "reserved"))
    return f"{names}| {result['step_s']:.4f} | {rate:.1f} | {mfu} | {memory} |"


def known_peak(device: str) -> float | None:
    """Of the devices that `swinv2-scale plan` knows; cards for PCIe are slower than their namesakes."""
    is_known = "PCIe" not in device and "NVL" not in device
    return next((d.tflops_16bit for d in DEVICES.values() if is_known and d.name in device.lower()), None)


def describe_gpu() -> str:
    """Without CUDA in this process: its context would take memory from the cases."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return "; ".join(lines) or "no GPU seen by nvidia-smi"


# In a case's process


def measure(case: Case, num_steps: int, extra: list[str]) -> dict[str, Any]:
    """Median seconds of a step and the peaks of memory over all timed ones; or ``failed``, where memory is short."""
    try:
        config = case.config(extra)
    except ConfigError as error:
        return {"failed": " ".join(str(error).split())[-300:]}
    size = config.data.micro_batch_size
    dist.start(600)
    try:
        seconds, peak = timed_steps(config, num_steps)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # of a CPU
            raise
        return {"failed": "out of memory", "micro_batch": size}
    finally:
        dist.stop()
    is_gpu = torch.cuda.is_available()
    return {
        "micro_batch": size,
        "step_s": statistics.median(seconds),
        "flops": training_flops(config),
        "device": torch.cuda.get_device_name() if is_gpu else "CPU",
        "peak_bytes": peak,
        "planned_bytes": predicted_peak_bytes(config),
        "reserved_bytes": torch.cuda.max_memory_reserved() if is_gpu else peak,
    }


def timed_steps(config: RunConfig, num_steps: int) -> tuple[list[float], int]:
    """Seconds of each step, and the most bytes allocated (on a CPU: resident) during them."""
    task = SimMIMTask(config)
    engine = build_engine(config, task, will_load=True)
    fill(engine)
    batch = synthetic_batch(config, task)
    device = dist.device()
    seconds: list[float] = []
    for number in range(3 + num_steps):
        if number == 3 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = train_step(engine, task, [batch], 1e-5, lambda loss, grad_norm: True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert result.is_applied, f"step {number} was refused: loss {result.loss}, gradient norm {result.grad_norm}"
        seconds.append(time.perf_counter() - started)
    return seconds[3:], peak_memory_bytes(device)


@torch.no_grad()
def fill(engine: Any) -> None:
    """Small random numbers into weights and masters, which ``will_load`` has left undefined."""
    for parameter in engine.module.parameters():
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", parameter.data)):
            tensor.normal_(std=0.02)
    for part in zero.parts(engine):
        part.master.view(-1)[part.start : part.end].normal_(std=0.02)


def synthetic_batch(config: RunConfig, task: SimMIMTask) -> Batch:
    """Noise, with masks as in training."""
    size, model = config.data.micro_batch_size, config.model
    images = torch.randint(0, 256, (size, model.in_channels, *model.image_shape), dtype=torch.uint8)
    masks = [draw_hidden(task.units, config.task.mask_ratio, Draw(0, "0", f"sample {i}")) for i in range(size)]
    hidden, drop_keys = torch.from_numpy(np.stack(masks)), torch.arange(size)
    batch = Batch({"images": images, "hidden": hidden, "drop_keys": drop_keys}, digest=0)
    return batch.pin_memory() if torch.cuda.is_available() else batch


if __name__ == "__main__":
    main()
