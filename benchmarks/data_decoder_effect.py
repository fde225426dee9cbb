"""Does the fast decoder change what a model learns? The same trainings with `data.decoder` fast and exact.

    .venv/bin/python benchmarks/data_decoder_effect.py > benchmarks/results/data_decoder_effect_HARDWARE_YYYYMM.md

SimMIM of the quick start's small Swin V2 on JPEGs of 500x375 (scikit-image's photographs, whole and in parts; two are
held back), crops of 0.1 to 1 of the area at 64 px, so that every scale of the JPEG decoder is used. Validation decodes
exactly in both. Same seed: same crops, masks and first weights, only the pixels differ.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from machine import describe_machine, describe_versions
from PIL import Image, ImageOps

from swinv2_scale.data.shards.writer import RawSample, write_shards
from swinv2_scale.data.sources.embedded import photographs

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a spread needs two seeds or more")
    print("# What the fast decoder does to training\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'simplejpeg', 'opencv-python-headless', 'pillow')}")
    print(f"- command: `benchmarks/data_decoder_effect.py --seeds {arguments.seeds} --steps {arguments.steps}`\n")
    print("Loss on held-back photographs, decoded exactly: error over hidden pixels, in standard deviations.\n")
    print("| seed | exact | fast | fast - exact |")
    print("|---|---|---|---|")
    losses: dict[str, list[float]] = {"exact": [], "fast": []}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "validation"):
            write_shards(jpegs(split), Path(folder) / split, samples_per_shard=16, made_by="data_decoder_effect.py")
        for seed in range(arguments.seeds):
            for decoder, found in losses.items():
                found.append(train(Path(folder), decoder, seed, arguments.steps))
            exact, fast = losses["exact"][-1], losses["fast"][-1]
            print(f"| {seed} | {exact:.4f} | {fast:.4f} | {fast - exact:+.4f} |", flush=True)
    differences = [fast - exact for fast, exact in zip(losses["fast"], losses["exact"], strict=True)]
    spread, own = statistics.stdev(differences), statistics.stdev(losses["exact"])
    print(f"\nMean difference {statistics.mean(differences):+.4f}, standard deviation over seeds {spread:.4f};")
    print(f"the exact runs' own standard deviation over seeds: {own:.4f}.")


def jpegs(split: str) -> Iterator[RawSample]:
    for sample in photographs(split):
        assert isinstance(sample["png"], bytes)
        image = ImageOps.fit(Image.open(io.BytesIO(sample["png"])).convert("RGB"), (500, 375), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        yield {"__key__": sample["__key__"], "jpg": buffer.getvalue()}


def train(folder: Path, decoder: str, seed: int, steps: int) -> float:
    run = folder / f"{decoder}-{seed}"
    overrides = [
        f"data.train={folder}/train/*.tar",
        f"data.validation={folder}/validation/*.tar",
        f"data.decoder={decoder}",
        f"seed={seed}",
        f"optim.total_steps={steps}",
        "optim.lr=1e-3",
        "evaluation.every_steps=0",
        "logging.panel_every_steps=0",
        "logging.tensorboard=false",
        "data.num_workers=1",
        "data.micro_batch_size=32",
    ]
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/photographs.yaml"]
    subprocess.run(
        [*command, "--run-dir", str(run), *overrides],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["validation_loss"])


if __name__ == "__main__":
    main()
