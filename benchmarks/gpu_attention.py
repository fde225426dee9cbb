"""The ``triton`` backend on a GPU: is it right, which launches are fast, and how fast against the other backends?

    .venv/bin/python benchmarks/gpu_attention.py --folder benchmarks/results/gpu_attention_HARDWARE_YYYYMM
    benchmarks/gpu_attention.py --folder /tmp/dry --dry-run       # on a CPU, tiny, in Triton's interpreter

Four parts, in this order; every row is written at once to FOLDER/attention.json and attention.md, so that what a
--budget-s (of seconds) or a limit from outside cuts off is the end:

    checks    values and three gradients against float64 eager, beside eager's own error; the same bits twice
    sweep     launches of every kernel, by the time that the profiler gives each kernel; ends with the rows of
              models/ops/triton_launches.py that were fastest. The parts that follow use them.
    operator  SwinV2-G's attention at 192/12, 640/40 and 1536/48, by backend: forward, forward and backward, peak memory
    steps     a training step of tiny and base at 256 px, window 16, against timm, eager and compiled

Times are medians. Steps of the giant: benchmarks/gpu.py. Where no wheels can be fetched: benchmarks/wheelhouse.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, describe_versions
from torch import Tensor

from swinv2_scale.models.factory import create_model
from swinv2_scale.models.ops.attend import Attend, resolve
from swinv2_scale.models.ops.triton_launches import Launch, Launches, launches_for
from swinv2_scale.models.tiles import Tiling, tiling

PARTS = ("checks", "sweep", "operator", "steps")
#: Fields of Launches, and the kernel that each is for.
KERNELS = {
    "forward": "forward",
    "query_gradient": "query_gradient",
    "key_gradient": "key_gradient",
    "table_gradient": "table_blocks",
}


@dataclass(frozen=True)
class Shape:
    """One call of the operator. A square map; bfloat16 but in checks."""

    side: int
    window: int
    heads: int
    batch: int
    shifted: bool = False
    dim: int = 32
    dtype: str = "bfloat16"
    width: int = 0  # of the map, where it isn't square

    @property
    def map_size(self) -> tuple[int, int]:
        return self.side, self.width or self.side

    def __str__(self) -> str:
        height, width = self.map_size
        shift = " shifted" if self.shifted else ""
        return f"{height}x{width} w{self.window}{shift}, {self.heads} heads of {self.dim}, batch {self.batch}"


CHECKS = (
    Shape(8, 4, 3, 2, True, 32, "float32"),
    Shape(7, 4, 3, 2, True, 32, "float32", width=10),
    Shape(24, 12, 4, 2, True, 32, "float32"),
    Shape(24, 12, 4, 2, False, 48, "float32"),
    *(Shape(24, 12, 4, 2, True, dim) for dim in (16, 32, 64, 128)),
    Shape(30, 12, 4, 2, True, width=44),
    Shape(40, 40, 4, 2),
    Shape(96, 48, 2, 1, True),
    Shape(16, 32, 2, 1, width=80),
)
SWEPT = (Shape(96, 48, 64, 1), Shape(40, 40, 64, 4), Shape(12, 12, 64, 64))
#: SwinV2-G: 16, 32, 64, 128 heads; its third stage has 42 of its 50 blocks.
OPERATORS = {
    "192/12, third stage": Shape(12, 12, 64, 64),
    "192/12, first stage": Shape(48, 12, 16, 16, True),
    "640/40, third stage": Shape(40, 40, 64, 4),
    "640/40, first stage": Shape(160, 40, 16, 1, True),
    "1536/48, third stage": Shape(96, 48, 64, 1),
    "1536/48, third stage, shifted": Shape(96, 48, 64, 1, True),
    "1536/48, first stage": Shape(384, 48, 16, 1, True),
}
CANDIDATES = {
    "forward": [(128, 64, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 128, 4, 2)],
    "query_gradient": [
        (64, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 32, 4, 3),
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 128, 8, 2),
    ],
    "key_gradient": [(64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 4, 3), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2)],
    "table_gradient": [
        (64, 64, 4, 3),
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 2),
    ],
}
STEPS = {"tiny": 64, "base": 48}  # images a step
#: The same at a size that the interpreter computes in seconds.
DRY_CHECKS = (Shape(2, 2, 1, 1, dim=16, dtype="float32", width=3),)
DRY_SHAPE = Shape(4, 4, 1, 1, dim=16)
DRY_CANDIDATES = {name: [(16, 16, 4, 1), (32, 32, 4, 1)] for name in CANDIDATES}


class Report:
    """What was measured, in two files that are written anew with every row."""

    def __init__(self, folder: Path, budget_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._end = folder, time.monotonic() + budget_s
        self._text: list[str] = []
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU used"
        self.facts: dict[str, Any] = {"machine": describe_machine(gpu), "versions": describe_versions("torch")}
        self.facts["command"] = f"benchmarks/gpu_attention.py {' '.join(sys.argv[1:])}"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.say(
            "# The triton backend on a GPU\n\n" + "\n".join(f"- {key}: {text}" for key, text in self.facts.items())
        )

    def is_over(self, seconds: float) -> bool:
        """Whether less than so many are left."""
        return time.monotonic() + seconds > self._end

    def row(self, part: str, **values: Any) -> None:
        """A row of a part's table, which has the columns of its first row."""
        if part not in self.rows:
            self.say(f"\n## {part}\n\n| {' | '.join(values)} |\n|{'---|' * len(values)}")
        self.rows.setdefault(part, []).append(values)
        self.say(f"| {' | '.join(_cell(value) for value in values.values())} |")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self._text.append(text)
        (self._folder / "attention.md").write_text("\n".join(self._text) + "\n")
        (self._folder / "attention.json").write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--budget-s", type=float, default=560, help="nothing starts that could end after so many")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: does it run at all?")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which is when the backend is resolved
    report = Report(arguments.folder, arguments.budget_s)
    best: dict[int, Launches] = {}
    is_dry = arguments.dry_run
    if "checks" in arguments.parts:
        check(report, DRY_CHECKS if is_dry else CHECKS)
    if "sweep" in arguments.parts:
        best = sweep(report, *(((DRY_SHAPE,), DRY_CANDIDATES) if is_dry else (SWEPT, CANDIDATES)))
    if "operator" in arguments.parts:
        time_operator(report, {"dry run": DRY_SHAPE} if is_dry else OPERATORS, best, 1 if is_dry else 10)
    if "steps" in arguments.parts:
        time_steps(report, is_dry)
    report.say("\nAll parts were done." if not report.is_over(0) else "\nThe budget was spent.")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# The operator's inputs, and what it gives


def inputs(shape: Shape) -> tuple[list[Tensor], Tensor, Tiling]:
    """qkv, scale and table, the gradient of the output, the tiles."""
    tiles = tiling(shape.map_size, (shape.window, shape.window), shape.shifted, device())
    generator = torch.Generator(device()).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device())
    length, dtype = math.prod(shape.map_size), getattr(torch, shape.dtype)
    qkv = random(shape.batch, length, 3, shape.heads, shape.dim).to(dtype)
    scale = torch.linspace(10.0, 60.0, shape.heads, device=device())
    table = 16 * torch.sigmoid(random(shape.heads, *(2 * side - 1 for side in tiles.window_size)))
    towards = random(shape.batch, length, shape.heads, shape.dim).to(dtype)
    return [x.requires_grad_() for x in (qkv, scale, table)], towards, tiles


def value_and_gradients(attend: Attend, leaves: list[Tensor], towards: Tensor, tiles: Tiling) -> list[Tensor]:
    out = attend(leaves[0], leaves[1], leaves[2], tiles)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards.to(out.dtype))]


def check(report: Report, shapes: tuple[Shape, ...]) -> None:
    """Errors are norms: |found - exact| / |exact| for the output and the gradients of qkv, scale, table."""
    for shape in shapes:
        if report.is_over(60):
            return
        leaves, towards, tiles = inputs(shape)
        wide = [x.detach().double().requires_grad_() for x in leaves]
        exact = value_and_gradients(resolve("eager", 0), wide, towards, tiles)
        row: dict[str, Any] = {"shape": str(shape), "type": shape.dtype}
        try:
            found, again = (value_and_gradients(resolve("triton", 0), leaves, towards, tiles) for _ in range(2))
        except Exception as error:  # whatever a compiler or a driver raises is a row
            report.row("checks", **row, triton=_short(error), eager="", same_bits="")
            continue
        of_eager = value_and_gradients(resolve("eager", 0), leaves, towards, tiles)
        row |= {"triton": _errors(found, exact), "eager": _errors(of_eager, exact)}
        report.row("checks", **row, same_bits=all(map(torch.equal, found, again)))


def _errors(found: list[Tensor], exact: list[Tensor]) -> str:
    pairs = zip(found, exact, strict=True)
    return " ".join(f"{float((a.double() - b).norm() / b.norm()):.1e}" for a, b in pairs)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].replace("|", "/")


# Launches


def sweep(
    report: Report, shapes: tuple[Shape, ...], candidates: dict[str, list[tuple[int, int, int, int]]]
) -> dict[int, Launches]:
    """The fastest launches by tokens of a tile; candidates of different kernels are timed in the same runs."""
    from swinv2_scale.models.ops import triton_attention

    best: dict[int, Launches] = {}
    for shape in shapes:
        leaves, towards, tiles = inputs(shape)
        tokens = tiles.groups[0].num_tokens
        chosen = launches_for(shape.dim, leaves[0].dtype.itemsize, tokens)
        fastest = dict.fromkeys(candidates, math.inf)
        for tried in zip(*candidates.values(), strict=True):
            if report.is_over(240):
                break
            named = {name: Launch(*numbers) for name, numbers in zip(candidates, tried, strict=True)}
            attend = partial(triton_attention.attend, launches=replace(chosen, **named))
            try:
                times = kernel_ms(partial(value_and_gradients, attend, leaves, towards, tiles))
            except Exception as error:
                report.row("sweep", shape=str(shape), launches=_short(error), **dict.fromkeys(KERNELS, ""))
                continue
            report.row("sweep", shape=str(shape), launches=" ".join(map(str, tried)), **times)
            for name, launch in named.items():
                if times[name] <= fastest[name]:
                    fastest[name], best[tokens] = times[name], replace(best.get(tokens, chosen), **{name: launch})
    rows = "\n".join(f"    {_row(tokens, found)}," for tokens, found in sorted(best.items(), reverse=True))
    report.say(f"\nFastest, for `LAUNCHES` of models/ops/triton_launches.py:\n\n```\n{rows}\n```")
    return best


def _row(tokens: int, found: Launches) -> str:
    launches = (getattr(found, name) for name in KERNELS)
    numbers = ", ".join(f"Launch({x.block_m}, {x.block_n}, {x.num_warps}, {x.num_stages})" for x in launches)
    return f"((64, 2, {tokens}), Launches({numbers}))"


def kernel_ms(run: Callable[[], object], repetitions: int = 3) -> dict[str, float]:
    """Milliseconds of every kernel by itself, from the profiler; inf where it saw none (a CPU)."""
    run()
    activity = (
        torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repetitions):
            run()
        _wait()
    seen = {event.key: event.self_device_time_total / 1e3 / repetitions for event in profile.key_averages()}
    return {name: seen.get(kernel, math.inf) for name, kernel in KERNELS.items()}


# Times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], object], num_runs: int) -> tuple[float, float]:
    """Median milliseconds, and the most GiB that came on top of what was allocated before."""
    run()
    _wait()
    before = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    milliseconds = []
    for _ in range(num_runs):
        started = time.perf_counter()
        run()
        _wait()
        milliseconds.append(1e3 * (time.perf_counter() - started))
        if sum(milliseconds) > 4000:
            break
    peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
    return statistics.median(milliseconds), peak / 2**30


def time_operator(report: Report, shapes: dict[str, Shape], best: dict[int, Launches], runs: int) -> None:
    for (label, shape), backend in itertools.product(shapes.items(), ("triton", "eager", "sdpa", "sequential")):
        if report.is_over(30):
            return
        leaves, towards, tiles = inputs(shape)
        attend = resolve(backend, 256 * 2**20)
        tokens = tiles.groups[0].num_tokens
        if backend == "triton" and tokens in best:
            attend = partial(attend, launches=best[tokens])
        row: dict[str, Any] = {"shape": f"{label}: {shape}", "backend": backend}
        try:
            with torch.no_grad():
                row["forward ms"], row["forward GiB"] = timed(partial(attend, *leaves, tiles), runs)
            both = partial(value_and_gradients, attend, leaves, towards, tiles)
            row["forward and backward ms"], row["forward and backward GiB"] = timed(both, runs)
        except torch.OutOfMemoryError:
            row |= dict.fromkeys(("forward ms", "forward GiB", "forward and backward ms"), "out of memory")
            row["forward and backward GiB"] = ""
        del leaves, towards
        report.row("operator", **row)


def time_steps(report: Report, is_dry: bool) -> None:
    """Forward, backward and AdamW of a classifier in bfloat16 autocast; fused AdamW for all."""
    for variant, batch in ({"tiny": 1} if is_dry else STEPS).items():
        for name, make in models(variant, is_dry):
            if report.is_over(90):
                return
            row: dict[str, Any] = {"model": f"{variant} 256/w16, batch {batch}", "implementation": name}
            torch.manual_seed(0)
            try:
                run = training_step(make().to(device()).train(), *((1, 16) if is_dry else (batch, 256)))
                row["step ms"], row["peak GiB"] = timed(run, 1 if is_dry else 15)
                row["images/s"] = 1e3 * batch / row["step ms"]
                del run
            except Exception as error:
                row |= {"step ms": _short(error), "peak GiB": "", "images/s": ""}
            report.row("steps", **row)


def models(variant: str, is_dry: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name, and what makes the model."""
    import timm

    size: dict[str, Any] = {"window_size": 4, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2)} if is_dry else {}
    own = {"image_size": 16, **size} if is_dry else {"image_size": 256, "window_size": 16}
    made = {
        "timm": partial(
            timm.create_model, f"swinv2_{variant}_window16_256", **({"img_size": 16} if is_dry else {}), **size
        )
    }
    for backend in ("triton", "eager"):
        attention = {"backend": backend}
        made[f"ours, {backend}"] = partial(
            create_model, f"swinv2_{variant}", num_classes=1000, attention=attention, **own
        )
    for name in ("ours, triton", "ours, eager", "timm"):
        yield name, made[name]
    for name in ("timm", "ours, triton"):
        yield f"{name}, compiled", partial(compiled, made[name], "eager" if is_dry else "inductor")


def compiled(make: Callable[[], Any], backend: str) -> Any:
    return torch.compile(make(), backend=backend)


def training_step(model: Any, batch: int, side: int) -> Callable[[], None]:
    images = torch.randn(batch, 3, side, side, device=device())
    labels = torch.randint(0, 1000, (batch,), device=device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device().type, torch.bfloat16):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
