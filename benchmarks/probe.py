"""What the quick start's pre-training teaches: probes of its features, and of random weights.

    flock LOCK .venv/bin/python benchmarks/probe.py [RUN] > benchmarks/results/probe_HARDWARE_YYYYMM.md

Trains configs/quickstart/simmim.yaml (`make pretrain`) in RUN, or what is left of it, and asks `swinv2-scale probe` of
its features and of those of three models with random weights: 8,000 labelled images of Fashion-MNIST to learn from,
2,000 to tell. Prints a Markdown page with the commands' raw output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine, describe_versions

from swinv2_scale.config.loader import load_config
from swinv2_scale.models.factory import create_model
from swinv2_scale.weights.api import save_weights
from swinv2_scale.weights.facts import Facts

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart" / "simmim.yaml"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        run = Path(sys.argv[1] if sys.argv[1:] else f"{folder}/run")
        begun = time.monotonic()
        train = [sys.executable, "launch/pretrain.py", "--config", str(CONFIG), "--run-dir", str(run)]
        output = _output([*train, f"data.shards_dir={shards}"])
        trained = time.monotonic() - begun
        cases = {
            "SimMIM, 350 steps": run,
            **{f"random weights, seed {seed}": _random(folder, seed) for seed in range(3)},
        }
        reports, seconds = {}, {}
        for name, weights in cases.items():
            begun = time.monotonic()
            reports[name] = json.loads(_output(_probe(weights, shards)))
            seconds[name] = time.monotonic() - begun
    print("# Probes of frozen features\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'numpy', 'pillow')}")
    print(f"- training: `launch/pretrain.py --config configs/quickstart/simmim.yaml`, {trained:.0f} s here")
    words = " ".join(_probe(Path("WEIGHTS"), Path("SHARDS"))[2:])
    print(f"- command: `python {words}`\n")
    print("| weights | k-NN top-1 | linear top-1 | linear top-5 | penalty | s |")
    print("|---|---|---|---|---|---|")
    for name, report in reports.items():
        knn, linear = report["knn"], report["linear"]
        shares = f"{knn['top1']:.2%} | {linear['top1']:.2%} | {linear['top5']:.2%}"
        print(f"| {name} | {shares} | {linear['penalty']:g} | {seconds[name]:.0f} |")
    print(
        "\nThe training's last lines:\n\n```\n"
        + "\n".join(output.strip().splitlines()[-4:]).replace(folder, "FOLDER")
        + "\n```"
    )
    for name, report in reports.items():
        print(f"\n{name}:\n\n```json\n{json.dumps(report)}\n```".replace(folder, "FOLDER"))


def _random(folder: str, seed: int) -> Path:
    config = load_config(CONFIG).config
    fields = config.model.model_dump(exclude={"variant", "attention"})
    path = Path(folder) / f"random-{seed}.safetensors"
    facts = Facts(pixel_mean=config.data.pixel_mean, pixel_std=config.data.pixel_std)
    save_weights(create_model(f"swinv2_{config.model.variant}", seed=seed, **fields), path, facts=facts)
    return path


def _probe(weights: Path, shards: Path) -> list[str]:
    data = ["--train", "embedded:fashion-mnist/train", "--validation", "embedded:fashion-mnist/validation"]
    # All of the image, as the pre-training saw it: its photographs have no margin to cut off.
    return [
        *(sys.executable, "-m", "swinv2_scale", "probe", str(weights), *data, "--shards-dir", str(shards)),
        *("--crop-pct", "1", "--workers", "1", "--json"),
    ]


def _output(command: list[str]) -> str:
    return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
