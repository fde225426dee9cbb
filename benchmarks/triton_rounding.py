"""How far the triton backend's rounding is from float64, in Triton's interpreter on a CPU (no GPU is used).

    .venv/bin/python benchmarks/triton_rounding.py > benchmarks/results/triton_rounding_HARDWARE_YYYYMM.md

One tile, one head of 32 channels, random q, k, v and output gradient, beside ``eager`` with the same inputs. An error
is |found - exact| / |exact|, norms over the tensor; exact is ``eager`` in float64 with the same (rounded) inputs. The
last column is the scale's gradient of a backward that takes rowsum(P * dP) from out . dout, out in bfloat16, and
doesn't correct it, by a formula in float64.
"""

from __future__ import annotations

import os

import torch
from machine import describe_machine, describe_versions
from torch import Tensor

from swinv2_scale.models.ops.attend import Attend, resolve
from swinv2_scale.models.ops.torch_attention import unit
from swinv2_scale.models.tiles import Tiling, tile_bias, tiling

NAMES = ("output", "qkv's gradient", "scale's", "table's")


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, by resolve
    torch.set_num_threads(1)
    print("# Rounding of the triton backend, interpreted\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'triton', 'numpy')}")
    print("- command: `python benchmarks/triton_rounding.py`, 1 thread\n")
    heads = ("type", "window", "scale", "backend", *NAMES, "scale's, uncorrected")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for dtype in (torch.float32, torch.bfloat16):
        for window in (12, 24):
            for scale in (10.0, 100.0):
                compare(window, scale, dtype)


def compare(window: int, scale: float, dtype: torch.dtype) -> None:
    """Two rows of the table."""
    generator = torch.Generator().manual_seed(5)
    length, tiles = window**2, tiling((window, window), (window, window), False, torch.device("cpu"))
    qkv = torch.randn(1, length, 3, 1, 32, generator=generator).to(dtype)
    table = 16 * torch.rand(1, 2 * window - 1, 2 * window - 1, generator=generator)
    towards = torch.randn(1, length, 1, 32, generator=generator).to(dtype)
    given = (qkv, torch.tensor([scale]), table)
    exact = value_and_gradients(resolve("eager", 0), tuple(x.double() for x in given), towards, tiles)
    uncorrected = "" if dtype == torch.float32 else f"{uncorrected_error(given, towards, exact):.1e}"
    for backend in ("triton", "eager"):
        found = value_and_gradients(resolve(backend, 0), given, towards, tiles)
        errors = [f"{float((a.double() - b).norm() / b.norm()):.1e}" for a, b in zip(found, exact, strict=True)]
        last = uncorrected if backend == "triton" else ""
        print(f"| {str(dtype)[6:]} | {window} | {scale:g} | {backend} | {' | '.join(errors)} | {last} |", flush=True)


def value_and_gradients(attend: Attend, given: tuple[Tensor, ...], towards: Tensor, tiles: Tiling) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attend(leaves[0], leaves[1], leaves[2], tiles)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards.to(out.dtype))]


def uncorrected_error(given: tuple[Tensor, ...], towards: Tensor, exact: list[Tensor]) -> float:
    """What delta's error e does to the scale's gradient: the sum of -e_i * P_ij * cos_ij."""
    qkv, scale, table = (x.double() for x in given)
    q, k, _ = qkv[0, :, :, 0].unbind(1)
    cosine = unit(q) @ unit(k).T
    window = (table.shape[1] + 1) // 2
    weights = (scale * cosine + tile_bias(table, (window, window))[0]).softmax(-1)
    rounded = exact[0].bfloat16().double()
    error = ((rounded - exact[0]) * towards.double())[0, :, 0].sum(-1)
    return float((error * (weights * cosine).sum(-1)).sum().abs() / exact[2].abs())


if __name__ == "__main__":
    main()
