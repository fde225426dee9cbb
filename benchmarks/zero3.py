"""What ZeRO-3 costs over ZeRO-1 on two ranks, and which of its settings matter for Swin.

    .venv/bin/python benchmarks/zero3.py --json FILE > benchmarks/results/zero3_HARDWARE_YYYYMM.md

Two ranks over gloo, each pinned to a core, one thread. All ways live in the same two processes and take turns, one step
each, in float32 with eager attention; medians of wall and of CPU seconds. Two models: tiny at 192 px, where arithmetic
counts, and giant's depths (50 blocks) at a thirty-second of its width, where DeepSpeed's own work does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ZERO = "engine.deepspeed_overrides.zero_optimization"
#: DeepSpeed's own default.
STAY = "engine.param_persistence_elements=100_000"
MODELS = {
    "tiny": ("model.image_size=192", "model.window_size=12", "data.micro_batch_size=4", "data.global_batch_size=8"),
    "deep": (
        *("model.image_size=64", "model.window_size=4", "model.depths=[2,2,42,4]", "model.embed_dim=16"),
        *("model.num_heads=[1,2,4,8]", "data.micro_batch_size=2", "data.global_batch_size=4"),
        "task.mask_patch_size=32",
    ),
}
#: (name, ZeRO stage, whether a block's parameters come at once, settings)
WAYS: tuple[tuple[str, int, bool, tuple[str, ...]], ...] = (
    ("ZeRO-1", 1, False, ()),
    ("ZeRO-3, module by module", 3, False, (STAY,)),
    ("same, reuse distance 0", 3, False, (STAY, f"{ZERO}.stage3_max_reuse_distance=0")),
    ("same, all small parameters partitioned", 3, False, ()),
    ("ZeRO-3, whole blocks", 3, True, (STAY,)),
    ("same, reuse distance 0", 3, True, (STAY, f"{ZERO}.stage3_max_reuse_distance=0")),
    ("same, all small parameters partitioned", 3, True, ()),
    ("same, and no prefetch", 3, True, ("engine.prefetch_bucket_elements=0",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, help="where all measured seconds go")
    options = parser.parse_args()
    from machine import describe_machine, describe_versions

    print("# ZeRO-3 on two ranks\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print(f"- command: `{' '.join(['.venv/bin/python benchmarks/zero3.py', *sys.argv[1:]])}`")
    print(f"- medians of {options.turns} turns of one step each, after two; CPU seconds are rank 0's")
    raw = {}
    for model in options.models:
        raw[model] = found = measure(model, options.turns)
        print(f"\n## {model}\n\n| way | wall, s | CPU, s | CPU over ZeRO-1 | wall, ZeRO-1 is 100 % |")
        print("|---|---|---|---|---|")
        wall, cpu = ([statistics.median(way[kind]) for way in found] for kind in ("wall", "cpu"))
        for way, w, c in zip(found, wall, cpu, strict=True):
            print(f"| {way['name']} | {w:.3f} | {c:.3f} | {c - cpu[0]:+.3f} | {wall[0] / w:.1%} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1) + "\n")


def measure(model: str, turns: int) -> list[dict[str, Any]]:
    """Start two ranks of this script; what rank 0 found."""
    from harness import rank_environments, write_training

    with tempfile.TemporaryDirectory() as folder:
        write_training(Path(folder))
        ranks = []
        for core, environment in zip(sorted(os.sched_getaffinity(0)), rank_environments(2), strict=False):
            command = ["taskset", "-c", str(core), sys.executable, __file__, folder, model, str(turns)]
            ranks.append(subprocess.Popen(command, env=environment | {"RANK_OF": model}, stdout=subprocess.DEVNULL))
        assert [rank.wait() for rank in ranks] == [0, 0]
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
        return found


def be_rank(folder: Path, model: str, turns: int) -> None:
    from swinv2_scale import dist
    from swinv2_scale.config.loader import load_config
    from swinv2_scale.engine import job
    from swinv2_scale.engine.deepspeed_config import translate
    from swinv2_scale.engine.inputs import open_inputs
    from swinv2_scale.engine.step import train_step
    from swinv2_scale.tasks.simmim import SimMIMTask

    dist.start(300)
    steps, found = [], []
    for name, stage, whole, settings in WAYS:
        config = load_config(folder / "config.yaml", [*MODELS[model], f"engine.zero_stage={stage}", *settings]).config
        job.translate = translate if whole else partial(module_by_module, translate)
        task = SimMIMTask(config)
        batch = next(iter(open_inputs(config).training(task, 0, 1)))
        engine = job.build_engine(config, task)
        steps.append(partial(train_step, engine, task, [batch], 1e-4, lambda loss, grad_norm: True))
        found.append({"name": name, "settings": settings, "wall": [], "cpu": []})
    for turn in range(-2, turns):
        for step, way in zip(steps, found, strict=True):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            dist.barrier()
            if turn >= 0:
                way["wall"].append(time.perf_counter() - wall)
                way["cpu"].append(time.process_time() - cpu)
    if dist.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.stop()


def module_by_module(translate: Any, config: Any, world_size: int) -> dict[str, Any]:
    """As DeepSpeed does it unasked."""
    sent: dict[str, Any] = translate(config, world_size)
    sent["zero_optimization"].pop("leaf_module", None)
    return sent


if __name__ == "__main__":
    if "RANK_OF" in os.environ:
        be_rank(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        main()
