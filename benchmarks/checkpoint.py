"""What a checkpoint costs: how long training stands still, how fast it is written, and how long resuming takes.

    .venv/bin/python benchmarks/checkpoint.py > benchmarks/results/checkpoint_HARDWARE_YYYYMM.md

One process, ZeRO-3, bf16. Per round, interleaved: the disk alone (as many bytes, written and
flushed), a synchronous save, an asynchronous one, first as the only work and then with training steps behind it. Then
real jobs, in turn: a first start, and one that resumes from a checkpoint, from the command to the first finished step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe_machine, describe_versions

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine.checkpoint import name_of, read
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.step import train_step
from swinv2_scale.tasks.simmim import SimMIMTask

REPOSITORY = Path(__file__).parents[1]
CONFIG = "configs/stages/{}/simmim_192w12.yaml"
#: The size of a checkpoint is the model's; pixels only make steps slow.
SETTINGS = (
    *("data.train=embedded:photographs/train", "data.validation=null", "data.num_workers=0"),
    *("model.image_size=64", "model.window_size=4", "data.global_batch_size=1", "data.micro_batch_size=1"),
    *("engine.reduce_bucket_elements=10_000_000", "engine.prefetch_bucket_elements=1_000_000"),
)


def settings(folder: Path) -> list[str]:
    return [*SETTINGS, f"data.shards_dir={folder}/shards", "logging.panel_every_steps=0", "optim.warmup_steps=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resume-model", default="tiny")
    parser.add_argument("--resume-rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()
    print("# Checkpoints\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print(f"- command: `.venv/bin/python benchmarks/checkpoint.py {' '.join(sys.argv[1:])}`")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure_saves(arguments.model, arguments.rounds, Path(folder))
        measure_resuming(arguments.resume_model, arguments.resume_rounds, Path(folder))


def measure_saves(model: str, rounds: int, folder: Path) -> None:
    config = load_config(REPOSITORY / CONFIG.format(model), [*settings(folder)]).config
    dist.start(60)
    task = SimMIMTask(config)
    engine = build_engine(config, task)
    batch = next(open_inputs(config).training(task, 0, 1))

    def step() -> None:
        train_step(engine, task, [batch], 1e-4, lambda loss, grad_norm: True)

    step()
    savers = {
        name: Saver(engine, folder / name, folder / name / ".part-x", CheckpointConfig(keep=2, asynchronous=is_behind))
        for name, is_behind in (("sync", False), ("async", True))
    }
    for name in savers:
        (folder / name / ".part-x").mkdir(parents=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(1, rounds + 2):
        found = measure_round(engine, savers, step, number, folder)
        print(f"round {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), file=sys.stderr)
        if number > 1:  # the first one allocates the snapshot's memory and warms up
            for name, value in found.items():
                seconds[name].append(value)
    report_saves(model, read(folder / "sync" / name_of(number)).num_bytes, seconds)
    dist.stop()


def measure_round(
    engine: Any, savers: dict[str, Saver], step: Callable[[], None], number: int, folder: Path
) -> dict[str, float]:
    sync, behind = savers["sync"], savers["async"]
    found = {"sync": timed(lambda: sync.begin(number, {}))}
    num_bytes = read(folder / "sync" / name_of(number)).num_bytes
    found["disk"] = timed(lambda: write_raw(folder / "raw", num_bytes))
    found["stall"] = timed(lambda: behind.begin(number, {}))
    found["behind"] = timed(lambda: wait(behind))
    behind.finish()
    found["deepspeed"] = timed(lambda: engine.save_checkpoint(str(folder / "ds"), tag="x", save_latest=False))
    shutil.rmtree(folder / "ds")
    found["step alone"] = timed(step)
    behind.begin(number + 1000, {})
    found["step beside a save"] = timed(step)
    behind.finish()
    return found


def report_saves(model: str, num_bytes: int, seconds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    mib = num_bytes / 2**20
    stalls = [stall / sync for stall, sync in zip(seconds["stall"], seconds["sync"], strict=True)]
    rates = [disk / behind for disk, behind in zip(seconds["disk"], seconds["behind"], strict=True)]
    print(f"- SwinV2-{model}, ZeRO-3, bf16: {mib:.0f} MiB a checkpoint; medians of {len(stalls)} rounds\n")
    print("| | median s | lowest | highest | MiB/s |\n|---|---|---|---|---|")
    for name, words in (
        ("disk", "the disk alone: write and flush as many bytes"),
        ("sync", "synchronous save, all of it"),
        ("stall", "asynchronous save: training waits"),
        ("behind", "asynchronous save: from there to the last byte on the disk"),
        ("deepspeed", "DeepSpeed's own save_checkpoint: no flush, no hash"),
        ("step alone", "a training step"),
        ("step beside a save", "the step while a save is written"),
    ):
        values = seconds[name]
        rate = f"{mib / median[name]:.0f}" if "step" not in name and name != "stall" else ""
        print(f"| {words} | {median[name]:.3f} | {min(values):.3f} | {max(values):.3f} | {rate} |")
    print(f"\n- stall against a synchronous save: {statistics.median(stalls):.1%} (to reach: under 10 %)")
    fastest = min(seconds["disk"]) / min(seconds["behind"])
    print(
        f"- write rate against the disk alone: {statistics.median(rates):.0%} (to reach: over 85 %); "
        f"the fastest of both against each other: {fastest:.0%}\n"
    )


def measure_resuming(model: str, rounds: int, folder: Path) -> None:
    """From the command to the first finished step: a new run, and the same one that goes on from a checkpoint."""
    config = CONFIG.format(model)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        run = folder / f"run-{number}"
        found = {name: timed(partial(job, config, run, folder, steps)) for name, steps in (("cold", 1), ("resumed", 2))}
        print(f"round {number}: {found}", file=sys.stderr)
        if number:
            for name, value in found.items():
                seconds[name].append(value)
        shutil.rmtree(run)
    ratios = [resumed / cold for resumed, cold in zip(seconds["resumed"], seconds["cold"], strict=True)]
    print(f"SwinV2-{model}, one process, from the command to the end of a job of one step, which saves:\n")
    print("| | median s | lowest | highest |\n|---|---|---|---|")
    for name, words in (("cold", "first start"), ("resumed", "resumed")):
        values = seconds[name]
        print(f"| {words} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    print(f"\n- resumed against a first start: {statistics.median(ratios):.2f} (to reach: under 1.15)")


def job(config: str, run: Path, folder: Path, steps: int) -> None:
    command = [sys.executable, "launch/pretrain.py", "--config", config, "--run-dir", str(run), "--steps", str(steps)]
    subprocess.run([*command, *settings(folder)], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def wait(saver: Saver) -> None:
    """Until the files are on the disk; what a loop asks at every step boundary."""
    while saver.is_busy:
        time.sleep(0.001)


def write_raw(path: Path, num_bytes: int) -> None:
    block = memoryview(os.urandom(2**24))
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, len(block)):
            written = file.write(block[: num_bytes - start])
            os.posix_fadvise(file.fileno(), start, written, os.POSIX_FADV_DONTNEED)  # as fast as the disk goes
        os.fsync(file.fileno())
    path.unlink()


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
