"""How well the order of samples is mixed, and how soon it is there.

    .venv/bin/python benchmarks/data_order.py > benchmarks/results/data_order_HARDWARE_YYYYMM.md

Mixing: the labels of an ImageNet-sized data set (1,000 classes, 1,000 shards of 1,000 samples) in the order that
training reads them, against a full permutation, for shards that were written class after class (the worst case) and for
shards that were mixed when they were written (what `swinv2-scale shards write` does).
Starting: a fresh process each time, from the call that opens the shards to the first batch in the trainer's hands;
imports are a column of their own. The shards were just written: the page cache is warm.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import describe_machine, describe_versions
from numpy.typing import NDArray
from PIL import Image

from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.manifest import INDEX_ENTRY, ShardEntry, write_manifest
from swinv2_scale.data.shards.writer import RawSample, write_shards

NUM_SHARDS, SHARD_SAMPLES, NUM_CLASSES, BATCH = 1000, 1000, 1000, 1024
LAGS = (1, 16, 256, 1024)
REPEATS = 5

OPEN = """
import json, os, sys, time
import psutil, torch, webdataset
from swinv2_scale.data.shards.shard_set import read_shard_set
before, started = psutil.Process().memory_info().rss, time.perf_counter()
shards = read_shard_set(sys.argv[1])
opened = time.perf_counter()
problems = shards.file_problems()
print(json.dumps({"samples": shards.num_samples, "open_s": opened - started,
    "files_s": time.perf_counter() - opened, "MiB": (psutil.Process().memory_info().rss - before) / 2**20}))
assert not problems
"""

FIRST_BATCH = """
import json, sys, time
born = time.perf_counter()
from swinv2_scale.config.loader import load_config
from swinv2_scale import dist
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.tasks.simmim import SimMIMTask
from pathlib import Path
imported = time.perf_counter()
config = load_config(Path(sys.argv[1]), sys.argv[2:]).config
dist.start(60)
started = time.perf_counter()
inputs = open_inputs(config)
opened = time.perf_counter()
batches = inputs.training(SimMIMTask(config), 0, 10)
batch = next(batches)
done = time.perf_counter()
batches.close()
print(json.dumps({"images": len(batch.arrays["images"]), "imports_s": imported - born, "open_s": opened - started,
    "batch_s": done - opened, "total_s": done - started}))
"""


def main() -> None:
    print("# The order of samples: mixing, and the start\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'webdataset', 'numpy')}")
    print("- command: `.venv/bin/python benchmarks/data_order.py`\n")
    mixing()
    starting()


def mixing() -> None:
    print(f"## Mixing: {NUM_SHARDS} shards of {SHARD_SAMPLES}, {NUM_CLASSES} classes, one epoch\n")
    print(f"Label autocorrelation at lag k: (P(label[i] = label[i+k]) - 1/{NUM_CLASSES}) / (1 - 1/{NUM_CLASSES});")
    print("0 is a full permutation, 1 means that the two always agree. Classes: how many different labels a batch of")
    print(f"{BATCH} holds on average (a full permutation: {NUM_CLASSES * (1 - (1 - 1 / NUM_CLASSES) ** BATCH):.0f}).\n")
    lags = " | ".join(f"lag {lag}" for lag in LAGS)
    print(f"| shards written | shuffle_shards | {lags} | classes in a batch | shards read at once |")
    print("|---|---|" + "---|" * (len(LAGS) + 2))
    rng = np.random.default_rng(0)
    total = NUM_SHARDS * SHARD_SAMPLES
    by_class = np.repeat(np.arange(NUM_CLASSES), total // NUM_CLASSES)
    row("full permutation of all", "-", rng.permutation(by_class), NUM_SHARDS)
    for written, labels in (("class after class", by_class), ("mixed", rng.permutation(by_class))):
        for shuffle_shards in (1, 16, 64, 256, NUM_SHARDS):
            order = Order.of((SHARD_SAMPLES,) * NUM_SHARDS, 0, True, shuffle_shards)
            read = np.fromiter((order.locate(position).number for position in range(total)), np.int64, total)
            row(written, str(shuffle_shards), labels[read], shuffle_shards)
    print()


def row(written: str, shuffle_shards: str, labels: NDArray[np.int64], num_open: int) -> None:
    chance = 1 / NUM_CLASSES
    values = [((labels[:-lag] == labels[lag:]).mean() - chance) / (1 - chance) for lag in LAGS]
    batches = labels[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    classes = np.mean([len(np.unique(batch)) for batch in batches])
    numbers = " | ".join(f"{value:.4f}" for value in values)
    print(f"| {written} | {shuffle_shards} | {numbers} | {classes:.0f} | {num_open} |", flush=True)


def starting() -> None:
    with tempfile.TemporaryDirectory() as folder:
        huge = Path(folder) / "huge"
        huge.mkdir()
        entries = []
        for number in range(NUM_SHARDS):
            name, size = f"{number:06d}.tar", 110 * 2**20
            for path, length in ((huge / name, size), (huge / f"{name}.index", SHARD_SAMPLES * INDEX_ENTRY.size)):
                with path.open("wb") as file:
                    file.truncate(length)  # sparse: nothing is read but the sizes
            entries.append(ShardEntry(name, SHARD_SAMPLES, size, f"{number:064x}"))
        write_manifest(huge, entries, "benchmarks/data_order.py")
        print(f"## Opening a manifest of {NUM_SHARDS * SHARD_SAMPLES:,} samples in {NUM_SHARDS} shards\n")
        table(OPEN, [f"{huge}/{{000000..{NUM_SHARDS - 1:06d}}}.tar"])

        small = Path(folder) / "small"
        write_shards(photographs(NUM_SHARDS * 16), small, samples_per_shard=16, made_by="benchmarks/data_order.py")
        print(f"## First batch of 64 images from {NUM_SHARDS} shards on a local disk, 2 workers, SimMIM at 192\n")
        config = Path(folder) / "config.yaml"
        config.write_text(
            f"model: {{variant: tiny, image_size: 192, window_size: 6}}\ntask: {{}}\ndata: {{train: '{small}/*.tar', "
            "global_batch_size: 64, micro_batch_size: 64, num_workers: 2}\noptim: {lr: 1.0e-4, total_steps: 10}\n"
        )
        table(FIRST_BATCH, [str(config)])


def photographs(count: int) -> Iterator[RawSample]:
    """JPEGs of 256 px of smooth noise."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(32):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    for number in range(count):
        yield {"__key__": f"{number:08d}", "jpg": images[number % 32]}


def table(code: str, arguments: list[str]) -> None:
    """Run a script in fresh processes; print what each measured, and medians."""
    rows = []
    for _ in range(REPEATS):
        command = [sys.executable, "-c", code, *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
    print("| start | " + " | ".join(rows[0]) + " |")
    print("|---|" + "---|" * len(rows[0]))
    for number, values in enumerate(rows, 1):
        print(f"| {number} | " + " | ".join(map(shown, values.values())) + " |")
    medians = [statistics.median(values[name] for values in rows) for name in rows[0]]
    print("| median | " + " | ".join(f"**{shown(value)}**" for value in medians) + " |\n", flush=True)


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
