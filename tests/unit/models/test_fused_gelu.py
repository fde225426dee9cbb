"""The GELU of our kernels: its error, its edges, its bits; and the MLP that uses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.models.block import Mlp
from swinv2_scale.models.ops import fused
from tests.support.fused_kernels import needs_fused
from tests.support.live_memory import saved_bytes

pytestmark = [needs_fused, pytest.mark.usefixtures("kernels")]


def both(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and the gradient of x."""
    again, dx = fused.gelu_backward(x, grad.clone())
    assert torch.allclose(again, fused.gelu(x), rtol=0, atol=0, equal_nan=True)
    return again, dx


def exactly(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double().requires_grad_()
    out = F.gelu(wide)
    return out.detach(), torch.autograd.grad(out, wide, grad.double())[0]


def test_the_error_is_a_rounding_of_the_input() -> None:
    x = torch.linspace(-20, 20, 100_003)
    grad = torch.linspace(1, 2, 100_003)
    (value, slope), (true, true_slope) = both(x, grad), exactly(x, grad)
    # torch's own have 3.4e-7 and 2.9e-7 of the same.
    assert ((value - true).abs() / x.abs().clamp(min=1)).max() < 1.5e-7
    assert ((slope - true_slope).abs() / grad).max() < 2.5e-7


def test_bfloat16_is_rounded_once() -> None:
    x = torch.linspace(-6, 6, 5001).bfloat16()
    grad = torch.linspace(-1, 1, 5001).bfloat16()
    for found, wide in zip(both(x, grad), both(x.float(), grad.float()), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_or_far_away_stays_what_it_is(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), 1e38, -1e38, 0.0, 17.0, -17.0], dtype=dtype)
    value, slope = both(x, torch.ones_like(x))
    assert value[0].isnan()
    assert slope[0].isnan()
    assert value[1:].tolist() == [float("inf"), x[2].item(), 0.0, 0.0, 17.0, 0.0]
    assert torch.allclose(slope[1:], torch.tensor([1, 1, 0, 0.5, 1, 0], dtype=dtype), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_depend_on_no_place_length_or_number_of_threads(dtype: torch.dtype) -> None:
    x, grad = (torch.randn(100_000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    whole = both(x, grad)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for start, end in ((0, 0), (0, 1), (7, 24), (3, 70_001), (0, 100_000)):
            part = both(x[start:end].clone(), grad[start:end].clone())
            assert all(torch.equal(a, b[start:end]) for a, b in zip(part, whole, strict=True))


def test_what_it_cannot_take_is_refused(kernels: str) -> None:
    for x in (torch.ones(3, dtype=torch.float64), torch.ones(4, 4).t()[1:]):
        with pytest.raises(RuntimeError, match="x must be contiguous float32 or bfloat16"):
            torch.ops.swinv2_scale.gelu(x)
    with pytest.raises(RuntimeError, match="the gradient must be as x"):
        torch.ops.swinv2_scale.gelu_backward(torch.ones(3), torch.ones(4))


def test_opcheck_finds_nothing() -> None:
    x = torch.randn(50, 3)
    checks = ("test_schema", "test_faketensor")  # autograd's part is linear.py's
    torch.library.opcheck(torch.ops.swinv2_scale.gelu.default, (x,), test_utils=checks)
    torch.library.opcheck(torch.ops.swinv2_scale.gelu_backward.default, (x, torch.randn(50, 3)), test_utils=checks)


@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "float64"])
def test_an_mlp_has_torchs_numbers_and_keeps_one_wide_tensor(kind: str, library: Any) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    ours = Mlp(24, 96, library, kernels=True).to(dtype)
    plain = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))
    plain.load_state_dict({f"{2 * (name[2] == '2')}{name[3:]}": p for name, p in ours.state_dict().items()})
    exact = copy.deepcopy(plain).double()
    plain.to(dtype)
    x = torch.randn(2, 50, 24, dtype=dtype)

    def results(module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and x.dtype == torch.float32):
            out = module(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]

    for found, theirs, true in zip(results(ours, x), results(plain, x), results(exact, x.double()), strict=True):
        error, allowed = ((each.double() - true).norm() / true.norm() for each in (found, theirs))
        assert error <= 1.5 * allowed + 1e-15
    if kind in ("float32", "bfloat16"):
        leaf = x.requires_grad_()
        assert saved_bytes(lambda: ours(leaf), ours.parameters()) == 100 * (24 + 96) * dtype.itemsize
