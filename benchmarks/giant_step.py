"""SwinV2-G, three billion parameters, takes real training steps on one machine of 24 GiB without a GPU.

    .venv/bin/python benchmarks/giant_step.py --folder DISK > benchmarks/results/giant_step_HARDWARE_YYYYMM.md

1. The giant stage (configs/stages/giant/) as it is, but for the batch (one photograph) and where things lie: ZeRO-3,
   bf16, optimizer states in files under --folder, by the real engine (engine/job.build_engine) and the real step
   (engine/step.train_step). The same batch again and again, with a learning rate to match, so that the loss has to
   fall. build_engine looks at the disk before anything is built. Peaks are of resident memory, each phase its own.
2. G's depths at a quarter of its width, by real jobs (launch/pretrain.py) with states in files: four steps without a
   break, then two, and two more of a new process that resumes; and two that resume without offloading. All numbers that
   are written down have to be equal; without offloading but for the gradient's norm, which DeepSpeed adds up in another
   order there.

Where there is a GPU the first part runs without offloading, and says memory and images a second; the second is left
out.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness import forget_peak, peak_bytes
from machine import describe_machine, describe_versions

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.step import train_step
from swinv2_scale.errors import ScaleError
from swinv2_scale.plan.zero import Sharding, states
from swinv2_scale.tasks.simmim import SimMIMTask

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "stages" / "giant" / "simmim_192w12.yaml"
DATA = ("data.train=embedded:photographs/train", "data.validation=null", "data.num_workers=0")
#: One photograph a step; small buffers, as nobody has to wait for a network.
SMALL_BUFFERS = (
    *("data.global_batch_size=1", "data.micro_batch_size=1", "engine.reduce_bucket_elements=50_000_000"),
    *("engine.max_live_elements=100_000_000", "engine.prefetch_bucket_elements=50_000_000"),
    "engine.deepspeed_overrides.zero_optimization.stage3_max_reuse_distance=100_000_000",
)
QUARTER = ("model.embed_dim=128", "model.num_heads=[4,8,16,32]")
STEPS = 3
LEARNING_RATE = 1e-4
COMPARED = ("step", "loss", "lr", "grad_norm", "samples_seen", "data_digest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch, on the disk to swap to (default: the temporary folder)")
    parser.add_argument("--skip-full-size", action="store_true", help="the second part alone")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    print("# A step of SwinV2-G\n")
    print(f"- machine: {describe_machine(torch.cuda.get_device_name() if has_gpu else 'no GPU used')}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print(f"- command: `.venv/bin/python benchmarks/giant_step.py {' '.join(sys.argv[1:])}`", flush=True)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if not has_gpu:
            resume(Path(folder))
        if not arguments.skip_full_size:
            try:
                full_size(Path(folder), has_gpu)
            except ScaleError as error:
                sys.exit(f"{error}")


def full_size(folder: Path, has_gpu: bool) -> None:
    settings = [*DATA, f"data.shards_dir={folder}/shards", "data.global_batch_size=1", "data.micro_batch_size=1"]
    if not has_gpu:
        offload = ("engine.offload.optimizer_states=nvme", f"engine.offload.nvme_dir={folder}/swap")
        settings += [*SMALL_BUFFERS, *offload]
    config = load_config(CONFIG, settings).config
    planned = states(Sharding.of(config, 1))
    dist.start(600)
    free = shutil.disk_usage(folder).free
    print(f"\n## Full size, {'on the GPU' if has_gpu else 'optimizer states in files'}\n")
    print(f"- states planned: {planned.disk / 1e9:.1f} GB of {free / 1e9:.1f} GB free on the disk", flush=True)
    task, phases = SimMIMTask(config), Phases()
    batch = next(open_inputs(config).training(task, 0, 1))
    with phases.measured("model and engine built, every first value drawn"):
        engine = build_engine(config, task)
    number = sum(math.prod(shape) for shape in Sharding.of(config, 1).shapes.values())
    print(f"- {number:,} parameters, {config.engine.precision}, ZeRO-{config.engine.zero_stage}, batch 1 at 192 px")
    engine.backward = phases.around("backward", engine.backward)
    engine.step = phases.around("update", engine.step)
    losses = []
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        result = train_step(engine, task, [batch], LEARNING_RATE, lambda loss, grad_norm: True)
        losses.append(result.loss)
        seconds = time.perf_counter() - started
        phases.say(f"step {step}", seconds)
        print(
            f"- step {step}: loss {result.loss:.6f}, gradient norm {result.grad_norm:.4f}, {seconds:.1f} s", flush=True
        )
        assert result.is_applied
    used = sum(path.stat().st_blocks * 512 for path in (folder / "swap").rglob("*") if path.is_file())
    print(f"- files at the end: {used / 1e9:.1f} GB; images a second: {1 / seconds:.4f}\n")
    print("| phase | seconds | peak of memory, GiB |\n|---|---|---|")
    for name, seconds, peak in phases.rows:
        print(f"| {name} | {seconds:.1f} | {peak / 2**30:.2f} |")
    verdict = "fell" if losses == sorted(losses, reverse=True) and len(set(losses)) == STEPS else "did NOT fall"
    print(f"\nThe loss {verdict} at every step: {', '.join(f'{loss:.6f}' for loss in losses)}.", flush=True)
    dist.stop()


class Phases:
    """Seconds of each phase, and the most memory that was resident (GPU: allocated) during it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        forget_peak()
        started = time.perf_counter()
        yield
        self.say(name, time.perf_counter() - started)

    def say(self, name: str, seconds: float) -> None:
        self.rows.append((name, seconds, peak_bytes()))
        print(f"{name}: {seconds:.1f} s, {self.rows[-1][2] / 2**30:.2f} GiB", file=sys.stderr, flush=True)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measured(name):
                return function(*args, **kwargs)

        return timed


def resume(folder: Path) -> None:
    print("\n## Saving and resuming with states in files: G's depths, a quarter of its width\n")
    settings = [*DATA, f"data.shards_dir={folder}/shards", *SMALL_BUFFERS, *QUARTER, "logging.tensorboard=false"]
    settings += ["optim.warmup_steps=1", "optim.total_steps=4", "optim.lr=1e-4", "logging.panel_every_steps=0"]
    settings += ["model.drop_path_rate=0.2", "optim.ema_decay=0.999", "engine.offload.sub_group_elements=10_000_000"]
    on_disk = ["engine.offload.optimizer_states=nvme", f"engine.offload.nvme_dir={folder}/swap"]
    config = load_config(CONFIG, [*settings, *on_disk]).config
    sharding = Sharding.of(config, 1)
    print(f"- {sharding.numel:,} parameters, {states(sharding).disk / 1e9:.2f} GB of states in files; ZeRO-3, bf16")
    unbroken = train(folder / "unbroken", 4, [*settings, *on_disk])
    train(folder / "broken", 2, [*settings, *on_disk])
    shutil.copytree(folder / "broken", folder / "without")
    broken = train(folder / "broken", 4, [*settings, *on_disk])
    without = train(folder / "without", 4, settings)
    for name in ("unbroken", "broken", "without"):
        shutil.rmtree(folder / name)  # the second part needs the room
    print("\n| step | unbroken | stopped after 2, resumed | resumed without offloading |\n|---|---|---|---|")
    for rows in zip(unbroken, broken, without, strict=True):
        print(f"| {rows[0]['step']} | " + " | ".join(f"{row['loss']!r}" for row in rows) + " |")
    print(f"\nAll of {', '.join(COMPARED)}: resumed {'equal' if unbroken == broken else 'NOT EQUAL'}.")
    norms = [(row.pop("grad_norm"), other.pop("grad_norm")) for row, other in zip(unbroken, without, strict=True)]
    difference = max(abs(one - other) / one for one, other in norms)
    verdict = "equal" if unbroken == without else "NOT EQUAL"
    print(
        f"Resumed without offloading: {verdict} but for grad_norm, which differs by {difference:.1e} at most.",
        flush=True,
    )


def train(run: Path, last_step: int, settings: list[str]) -> list[dict[str, Any]]:
    """What a job up to a step wrote down."""
    command = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(CONFIG)]
    command += ["--run-dir", str(run), "--steps", str(last_step), *settings]
    finished = subprocess.run(command, stdout=sys.stderr, check=False)
    assert finished.returncode == 0, f"{run.name} ended with {finished.returncode}"
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return list(islice(({key: row[key] for key in COMPARED} for row in rows), last_step))


if __name__ == "__main__":
    main()
