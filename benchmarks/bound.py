"""What a train step could reach on this CPU: its matrix products alone at the CPU's own rate, and where the rest goes.

    .venv/bin/python benchmarks/bound.py > benchmarks/results/bound_HARDWARE_YYYYMM.md

SwinV2-T with `fused` attention, batch 4, one thread, malloc keeping freed memory for both. The floor is the arithmetic
of the step's products, attention's too, at the rate of a product of 2048 x 2048 matrices (float32: MKL's or oneDNN's,
whichever is faster) measured in the same process; nothing can be faster that multiplies as many numbers. "At most" is
the peer's step over the floor. Shares are torch.profiler's own times of operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import apart, in_turns, print_header, print_table
from peers import SETTINGS, Setting, Work, hugging_face, ours, timm_model
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from swinv2_scale import dist
from swinv2_scale.plan.cost import num_multiply_adds
from swinv2_scale.plan.speed import attention_again

BATCH = 4
#: Parts of names of operations; the first that fits.
GROUPS = {
    "attention": ("window_attention",),
    "products": ("_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "conv"),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "AdamW": ("addcdiv", "addcmul", "sqrt", "lerp", "AdamW", "adamw"),
    "copies, casts": ("copy", "aten::cat", "_to_copy"),
}


def rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product; the median of seven."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    ways: list[Callable[[], Any]] = [lambda: F.linear(a, b)]
    if dtype == torch.float32:
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * 2048**3 / min(statistics.median(in_turns({"": way}, 7)[""].cpu) for way in ways)


def flops(model: nn.Module) -> int:
    """Of all products of a batch's step, the scores that backward computes again included."""
    config = model.encoder.config if hasattr(model, "encoder") else model.config
    return BATCH * (6 * num_multiply_adds(config, as_published=False) + attention_again(config))


def shares(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        group = next((g for g, parts in GROUPS.items() if any(part in event.key for part in parts)), "other")
        spent[group] += event.self_cpu_time_total
    return {group: spent[group] / spent.total() for group in [*GROUPS, "other"]}


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.keep_freed_memory()
    build = timm_model if setting.task == "classify" else hugging_face
    works = {
        "ours": Work(setting, "ours", lambda: ours(setting, "fused"), BATCH),
        "peer": Work(setting, "peer", lambda: build(setting), BATCH),
    }
    times = in_turns({name: work.train for name, work in works.items()}, rounds)
    speed = rate(torch.float32 if setting.precision == "fp32" else torch.bfloat16)
    floor = flops(works["ours"].model) / speed
    found = {name: each.summary["cpu"] for name, each in times.items()}
    return {**found, "rate": speed, "floor": floor, "shares": shares(works["ours"].train)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", type=Path, help="a JSON file for every number")
    parser.add_argument("--case", nargs=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(SETTINGS[options.case[0]], options.rounds)))
        return
    begun = time.monotonic()
    torch.set_num_threads(1)
    print_header("The floor of a train step", ("torch", "timm", "transformers"))
    found = {name: apart(__file__, [name], ["--rounds", str(options.rounds)]) for name in SETTINGS}
    columns = ("step", "GFLOP/s of a product", "floor, CPU s", "ours", "peer's", "peer / ours", "at most")
    rows = []
    for name, each in found.items():
        seconds = [f"{each[key]:.2f}" for key in ("floor", "ours", "peer")]
        ratios = [f"x{each['peer'] / each[key]:.2f}" for key in ("ours", "floor")]
        rows.append([name, f"{each['rate'] / 1e9:.0f}", *seconds, *ratios])
    print_table(columns, rows)
    print("\nWhere our step's time goes:")
    groups = [*GROUPS, "other"]
    print_table(("step", *groups), ([n, *(f"{e['shares'][g]:.1%}" for g in groups)] for n, e in found.items()))
    print(f"\nThe peer is timm for classification, Hugging Face for SimMIM. {time.monotonic() - begun:.0f} s.")
    if options.raw:
        options.raw.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
