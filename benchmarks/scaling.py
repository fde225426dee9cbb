"""Weak scaling: one job of two processes against two independent jobs of one, on the same two cores.

    .venv/bin/python benchmarks/scaling.py > benchmarks/results/scaling_HARDWARE_YYYYMM.md

Real jobs (launch/pretrain.py), one thread a process, each process pinned to a core, the same micro-batch for every
process. The control is two jobs at the same time, not one alone: two processes share caches and memory even where they
don't talk. All four processes are started together, and then take turns, one step each: while one side works the other
is stopped (SIGSTOP). So what the machine's neighbours do meets both alike; jobs of a minute, one after the other, came
to efficiencies from 92 to 113 %. A step is timed from SIGCONT to its row in metrics.jsonl. Efficiency of a turn =
images/s of the job of two / sum of the images/s of the two independent ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import rank_environments, write_training
from machine import describe_machine, describe_versions

ROOT = Path(__file__).parents[1]
DEADLINE_S = 300
#: (name, zero_stage, efficiency to reach)
CASES = (("stage 0 (DDP)", 0, 0.95), ("ZeRO-1", 1, 0.97), ("ZeRO-3", 3, 0.90))


@dataclass
class Job:
    """A running job, stopped but for its turns."""

    run: Path
    images: int  # of a step
    processes: list[subprocess.Popen[bytes]]

    @property
    def num_steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def signal(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where the rates of all turns go")
    parser.add_argument("--stages", type=int, nargs="*", choices=(0, 1, 3), default=(0, 1, 3), help="of ZeRO")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every job")
    options = parser.parse_intermixed_args()
    print("# Weak scaling: one job of two processes against two independent processes\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print(f"- command: `{' '.join(['.venv/bin/python benchmarks/scaling.py', *sys.argv[1:]])}`")
    print(f"- SwinV2-tiny, SimMIM at 192 px, window 12, float32, {options.micro_batch_size} images a process and step")
    print(f"- one thread a process, each pinned to a core; {options.turns} turns of one step\n")
    print("| case | turn | job of two, images/s | independent, images/s each | efficiency |")
    print("|---|---|---|---|---|")
    results = []
    for name, stage, goal in CASES:
        if stage not in options.stages:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append((name, goal, measure(Path(folder), name, stage, options)))
        if options.json:
            options.json.write_text(json.dumps({name: turns for name, _, turns in results}, indent=1) + "\n")
    print("\n| case | efficiency, median | lowest, highest turn | to reach |")
    print("|---|---|---|---|")
    for name, goal, turns in results:
        found = [turn["efficiency"] for turn in turns]
        spread = f"{min(found):.1%}, {max(found):.1%}"
        print(f"| {name} | **{statistics.median(found):.1%}** | {spread} | {goal:.0%} |")


def measure(folder: Path, name: str, stage: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The efficiency of each turn, and the images/s that it is made of."""
    write_training(folder)
    cores = sorted(os.sched_getaffinity(0))[:2]
    words = [f"engine.zero_stage={stage}", *options.overrides]
    two = start(folder, "of-two", cores, options.micro_batch_size, words)
    # It writes the shards; then the others only read them.
    wait_for(lambda: two.num_steps >= 1, [two])
    two.signal(signal.SIGSTOP)
    ones = [start(folder, f"alone-{core}", [core], options.micro_batch_size, words) for core in cores]
    jobs = [two, *ones]
    try:
        wait_for(lambda: all(job.num_steps >= 1 for job in ones), ones)
        for job in ones:
            job.signal(signal.SIGSTOP)
        take_turn([two])  # begun steps are finished
        take_turn(ones)
        found = []
        for number in range(options.turns):
            order = ([two], ones) if number % 2 == 0 else (ones, [two])
            rates = {side[0].run.name: take_turn(side) for side in order}
            (together,), alone = rates["of-two"], rates[ones[0].run.name]
            found.append({"together": together, "alone": alone, "efficiency": together / sum(alone)})
            each = ", ".join(f"{rate:.3f}" for rate in alone)
            print(f"| {name} | {number + 1} | {together:.3f} | {each} | {together / sum(alone):.1%} |", flush=True)
        return found
    finally:
        for job in jobs:
            job.signal(signal.SIGKILL)
            for process in job.processes:
                process.wait()
            shutil.rmtree(job.run, ignore_errors=True)


def take_turn(side: list[Job]) -> list[float]:
    """Let each job of a side go on for one step; images/s of each."""
    before = [job.num_steps for job in side]
    begun = time.monotonic()
    for job in side:
        job.signal(signal.SIGCONT)
    seconds: dict[int, float] = {}

    def is_over() -> bool:
        for number, job in enumerate(side):
            if number not in seconds and job.num_steps > before[number]:
                seconds[number] = time.monotonic() - begun
                job.signal(signal.SIGSTOP)
        return len(seconds) == len(side)

    wait_for(is_over, side)
    return [job.images / seconds[number] for number, job in enumerate(side)]


def wait_for(condition: Callable[[], bool], jobs: list[Job]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        for process in (process for job in jobs for process in job.processes):
            assert process.poll() is None, (jobs[0].run / "log" / "rank-0.log").read_text()
        assert time.monotonic() < end, "deadline reached"
        time.sleep(0.005)


def start(folder: Path, name: str, cores: list[int], micro_batch_size: int, words: list[str]) -> Job:
    """One process on each of the cores."""
    processes, run, count = [], folder / name, len(cores)
    alone = [{**os.environ, "OMP_NUM_THREADS": "1"}]
    for core, environment in zip(cores, rank_environments(count) if count > 1 else alone, strict=True):
        environment["PYTHONPATH"] = str(ROOT)
        command = ["taskset", "-c", str(core), sys.executable, str(ROOT / "launch" / "pretrain.py")]
        command += ["--config", str(folder / "config.yaml"), "--run-dir", str(run), *words]
        command += [f"data.micro_batch_size={micro_batch_size}", f"data.global_batch_size={micro_batch_size * count}"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    return Job(run, micro_batch_size * count, processes)


if __name__ == "__main__":
    main()
