"""How far each attention backend is from float64 eager: output and three gradients, by type, scale and window.

    .venv/bin/python benchmarks/rounding.py > benchmarks/results/rounding_HARDWARE_YYYYMM.md

Normal random queries, keys and values, 32 channels a head, tables of 0 to 16, shifted windows on a map of two a side.
Errors are max |found - float64| / max |float64| of one tensor; bf16 inputs are the same numbers for both sides.
"""

from __future__ import annotations

from itertools import product

import torch
from harness import print_header, print_table
from torch import Tensor

from swinv2_scale.models.ops import fused
from swinv2_scale.models.ops.attend import Attend, resolve
from swinv2_scale.models.tiles import Tiling, tiling

HEADS, DIM = 2, 32
NAMES = ("output", "qkv gradient", "scale gradient", "table gradient")


def inputs(window: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(window)
    qkv = torch.randn(1, 4 * window**2, 3, HEADS, DIM, generator=generator).to(dtype)
    table = 16 * torch.rand(HEADS, 2 * window - 1, 2 * window - 1, generator=generator)
    return qkv, torch.full((HEADS,), scale), table


def results(attend: Attend, given: tuple[Tensor, ...], tiles: Tiling) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attend(*leaves, tiles)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, towards.to(out.dtype))]


def main() -> None:
    torch.set_num_threads(1)
    backends: dict[str, tuple[Attend, str]] = {
        name: (resolve(name, 2**20), "") for name in ("eager", "sequential", "sdpa")
    }
    resolve("fused", 1)
    for kernels in torch.ops.swinv2_scale.usable_kernels():
        backends[f"fused {kernels}"] = (fused.fused, kernels)
    print_header("Rounding of attention backends", ("torch",))
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for window, scale in product((8, 24), (10.0, 100.0)):
            tiles = tiling((2 * window, 2 * window), (window, window), True, torch.device("cpu"))
            given = inputs(window, scale, dtype)
            true = results(backends["eager"][0], tuple(x.double() for x in given), tiles)
            for name, (attend, kernels) in backends.items():
                if kernels:
                    torch.ops.swinv2_scale.select_kernels(kernels)
                errors = [
                    f"{float((found.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max()):.1e}"
                    for found, exact in zip(results(attend, given, tiles), true, strict=True)
                ]
                rows.append((window, f"{scale:g}", name, *errors))
        print(f"\n## {str(dtype).removeprefix('torch.')}")
        print_table(("window", "scale", "backend", *NAMES), rows)


if __name__ == "__main__":
    main()
