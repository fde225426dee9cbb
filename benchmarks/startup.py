"""From the launch to the first step of the quick start: CPU seconds of a rank, and what imports alone take.

    .venv/bin/python benchmarks/startup.py > benchmarks/results/startup_HARDWARE_YYYYMM.md

Two ranks without a launcher, the embedded shards written before. CPU seconds are rank 0's own (all threads, user and
system) when the first row of RUN/metrics.jsonl is there; its loader's workers beside them. Imports are each a process
of its own. All take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness import rank_environments
from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]
IMPORTS = {
    "import torch": "import torch",
    "import torch, deepspeed": "import torch, deepspeed",
    "our training script's imports": "import swinv2_scale.engine.job",
    "import torch, timm": "import torch, timm",
    "import torch; from transformers import Swinv2Model": "import torch; from transformers import Swinv2Model",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw", type=Path, help="a JSON file for every number")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first_step(Path(folder), 0)  # writes the shards, fills the page cache
        rows: dict[str, list[tuple[float, float]]] = {}
        workers: list[float] = []
        for number in range(1, arguments.rounds + 1):
            for name, code in IMPORTS.items():
                rows.setdefault(name, []).append(imported(code))
            cpu, wall, of_workers = first_step(Path(folder), number)
            rows.setdefault("launch to first step", []).append((cpu, wall))
            workers.append(of_workers)
    print("# Start-up\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'timm', 'transformers')}")
    print(f"- command: `.venv/bin/python benchmarks/startup.py --rounds {arguments.rounds}`")
    print(f"- loader's workers until then: {statistics.median(workers):.2f} CPU s, not in the table\n")
    print("| what | CPU s | wall s | CPU s of each round |\n|---|---|---|---|")
    for name, found in rows.items():
        cpus, walls = zip(*found, strict=True)
        each = " ".join(f"{cpu:.2f}" for cpu in cpus)
        print(f"| {name} | {statistics.median(cpus):.2f} | {statistics.median(walls):.2f} | {each} |")
    if arguments.raw:
        found = {name: [{"cpu": cpu, "wall": wall} for cpu, wall in each] for name, each in rows.items()}
        arguments.raw.write_text(json.dumps(found, indent=1) + "\n")


def imported(code: str) -> tuple[float, float]:
    """CPU and wall seconds of a process that does nothing else."""
    started = time.perf_counter()
    script = f"{code}; import time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return float(done.stdout.split()[-1]), time.perf_counter() - started


def first_step(folder: Path, number: int) -> tuple[float, float, float]:
    """CPU and wall seconds of the rank until its first step is written down, and its workers' CPU seconds."""
    run = folder / f"run{number}"
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/simmim.yaml", "--run-dir", run]
    command.append(f"data.shards_dir={folder}/shards")
    environments = rank_environments(2)
    started = time.perf_counter()
    ranks = [psutil.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=each) for each in environments]
    process = ranks[0]
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            sys.exit(f"the job ended with {process.returncode} before its first step")
        time.sleep(0.01)
    wall, own = time.perf_counter() - started, process.cpu_times()
    workers = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    for one in ranks:
        one.terminate()
    for one in ranks:
        one.wait()
    return own.user + own.system, wall, workers


if __name__ == "__main__":
    main()
