"""Linears, MLPs and whole steps: who multiplies, what is kept, what torch.compile gives.

    .venv/bin/python benchmarks/linear.py --json FILE > benchmarks/results/linear_HARDWARE_YYYYMM.md

One thread, process CPU seconds, the ways of each table in turns, medians; ratios are the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import in_turns, saved_bytes
from machine import describe_machine, describe_versions
from torch import Tensor, nn

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine import compilation
from swinv2_scale.models.block import Mlp
from swinv2_scale.models.factory import initialise
from swinv2_scale.models.linear import Library, Linear
from swinv2_scale.tasks.simmim import SimMIM, SimMIMTask

BATCH = 4
#: (tokens of a batch of 4 at 192 px, width) of tiny's stages.
STAGES = ((9216, 96), (2304, 192), (576, 384), (144, 768))
LIBRARIES: tuple[Library, ...] = ("torch", "onednn")
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "simmim.yaml"
STEP = (
    *("model.in_channels=3", "data.pixel_mean=[0.5,0.5,0.5]", "data.pixel_std=[0.5,0.5,0.5]"),
    *("model.image_size=192", "model.window_size=12", "model.patch_size=4", "model.embed_dim=96"),
    *("model.depths=[2,2,6,2]", "model.num_heads=[3,6,12,24]", "task.mask_patch_size=32"),
    "engine.activation_checkpointing.backend=none",
)
STEPS = {
    "float32, torch": ("engine.precision=fp32", "model.linear=torch"),
    "float32, onednn": ("engine.precision=fp32", "model.linear=onednn"),
    "float32, onednn, compiled": ("engine.precision=fp32", "model.linear=onednn", "model.compile=true"),
    "bfloat16 autocast": ("engine.precision=bf16_autocast",),
    "bfloat16 autocast, compiled": ("engine.precision=bf16_autocast", "model.compile=true"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where all measured seconds go")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS), help="which whole steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("# Linears, MLPs and steps\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch')}")
    print(f"- command: `{' '.join(['.venv/bin/python benchmarks/linear.py', *sys.argv[1:]])}`")
    print(f"- one thread, CPU seconds of the process, {options.rounds} rounds in turns after a first one, medians\n")
    raw = {"linears": linears(options.rounds), "mlps": mlps(options.rounds), "steps": steps(options)}
    if options.json:
        options.json.write_text(json.dumps(raw, indent=1) + "\n")


def cpu_seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Of each way, each round."""
    return {name: times.cpu for name, times in in_turns(ways, rounds).items()}


class Pair:
    """One layer's forward and backward, to be timed apart."""

    def __init__(self, layer: Linear, tokens: int) -> None:
        self.layer = layer
        self.x = torch.randn(tokens, layer.in_features, requires_grad=True)
        self.grad = torch.randn(tokens, layer.out_features)

    def forward(self) -> None:
        self.out: Tensor = self.layer(self.x)

    def backward(self) -> None:
        self.out.backward(self.grad)


def linears(rounds: int) -> dict[str, Any]:
    print("## Float32 products, GFLOP/s\n")
    print("| tokens, in, out | forward torch | onednn | backward torch | onednn | both, onednn is |")
    print("|---|---|---|---|---|---|")
    raw: dict[str, Any] = {}
    for tokens, dim in STAGES:
        for num_in, num_out in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)):
            ways = {}
            for library in LIBRARIES:
                pair = Pair(Linear(num_in, num_out, library=library), tokens)
                ways |= {f"forward {library}": pair.forward, f"backward {library}": pair.backward}
            seconds = cpu_seconds(ways, rounds)
            raw[f"{tokens}, {num_in}, {num_out}"] = seconds
            median = {name: statistics.median(values) for name, values in seconds.items()}
            flops = 2e-9 * tokens * num_in * num_out
            rates = [
                (1 + (which == "backward")) * flops / median[f"{which} {library}"]
                for which in ("forward", "backward")
                for library in LIBRARIES
            ]
            torchs, onednns = (sum(median[f"{w} {n}"] for w in ("forward", "backward")) for n in LIBRARIES)
            cells = " | ".join(f"{rate:.0f}" for rate in rates)
            print(f"| {tokens}, {num_in}, {num_out} | {cells} | x{torchs / onednns:.2f} |", flush=True)
    print()
    return raw


def mlps(rounds: int) -> dict[str, Any]:
    print("## MLPs: torch's Linear, GELU, Linear against ours, which makes the GELU again in backward\n")
    print("| tokens, width | type | torch's ms | ours, torch | ours, onednn | torch's MB kept | ours |")
    print("|---|---|---|---|---|---|---|")
    raw: dict[str, Any] = {}
    for tokens, dim in STAGES:
        for dtype in (torch.float32, torch.bfloat16):
            plain = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            layers = {"plain": plain, **{library: Mlp(dim, 4 * dim, library) for library in LIBRARIES}}
            x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
            ways = {name: partial(both, layer.to(dtype), x) for name, layer in layers.items()}
            seconds = cpu_seconds(ways, rounds)
            kept = [
                saved_bytes(partial(layers[name], x), layers[name].parameters()) / 1e6 for name in ("plain", "torch")
            ]
            raw[f"{tokens}, {dim}, {dtype}"] = {"seconds": seconds, "kept": kept}
            times = " | ".join(f"{1e3 * statistics.median(values):.1f}" for values in seconds.values())
            name = str(dtype).removeprefix("torch.")
            print(f"| {tokens}, {dim} | {name} | {times} | {kept[0]:.1f} | {kept[1]:.1f} |", flush=True)
    print()
    return raw


def both(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


def steps(options: argparse.Namespace) -> dict[str, Any]:
    print(f"## Forward and backward of SimMIM, tiny at 192 px, window 12, eager attention, {BATCH} images\n")
    made = {name: step_of(load_config(CONFIG, [*STEP, *STEPS[name]]).config) for name in options.steps}
    compiling = {}
    for name, step in made.items():
        begun = time.process_time()
        step()
        compiling[name] = time.process_time() - begun
    seconds = cpu_seconds(made, options.rounds)
    print("| step | seconds | to the first of its type | the first one took |")
    print("|---|---|---|---|")
    first: dict[str, float] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        base = first.setdefault(name.split(",")[0], median)
        print(f"| {name} | {median:.3f} | x{base / median:.2f} | {compiling[name]:.1f} |")
    return {"seconds": seconds, "first": compiling}


def step_of(config: RunConfig) -> Callable[[], None]:
    model = SimMIMTask(config).build_model()
    assert isinstance(model, SimMIM)
    initialise(model, 0)
    compilation.apply(model, config)
    images = torch.randint(0, 256, (BATCH, 3, 192, 192), dtype=torch.uint8)
    hidden = (torch.arange(36).view(6, 6) * 5 % 36 < 22).expand(BATCH, 6, 6)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16_autocast"):
            losses, _ = model(images, hidden)
        losses.mean().backward()
        model.zero_grad()

    return step


if __name__ == "__main__":
    main()
