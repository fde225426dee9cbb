"""Residual post normalisation by our kernels: beside float64, its bits, its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from swinv2_scale.models.norm import ResidualPostNorm
from swinv2_scale.models.ops import fused
from tests.support.fused_kernels import needs_fused
from tests.support.live_memory import saved_bytes

pytestmark = [needs_fused, pytest.mark.usefixtures("kernels")]
SHARES = torch.tensor([0.0, 2.0, 1.25]).view(3, 1, 1)


def norms(channels: int, dtype: torch.dtype) -> tuple[ResidualPostNorm, ResidualPostNorm, ResidualPostNorm]:
    """Ours, torch's, and torch's in float64; the same drawn weights."""
    torch.manual_seed(0)
    ours = ResidualPostNorm(channels, kernels=True)
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    ours = ours.to(dtype)
    theirs, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    theirs.kernels = exact.kernels = False
    return ours, theirs, exact


def drawn(channels: int, dtype: torch.dtype, tokens: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """branch, x and the gradient of their sum."""
    x, branch, grad = torch.randn(3, 3, tokens, channels, generator=torch.Generator().manual_seed(1))
    return (3 * branch + 1).to(dtype), x.to(dtype), grad.to(dtype)


def results(norm: ResidualPostNorm, inputs: tuple[Tensor, ...], share: Tensor | None) -> list[Tensor]:
    """out, and the gradients of branch, x, weight and bias."""
    norm = copy.deepcopy(norm)
    branch, x, grad = (each.to(torch.promote_types(each.dtype, norm.weight.dtype)) for each in inputs)
    branch, x = branch.detach().requires_grad_(), x.detach().requires_grad_()
    out = norm(branch, x, share)
    out.backward(grad)
    return [out.detach(), branch.grad, x.grad, norm.weight.grad, norm.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("share", [None, SHARES], ids=["whole", "shares"])
@pytest.mark.parametrize("channels", [1, 7, 40, 96, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_as_torchs(dtype: torch.dtype, channels: int, share: Tensor | None) -> None:
    inputs = drawn(channels, dtype)
    found = [results(norm, inputs, share) for norm in norms(channels, dtype)]
    for ours, theirs, true in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        error, allowed = ((each.double() - true).norm() for each in (ours, theirs))
        assert error <= 1.5 * allowed + 5e-7 * (true.norm() + 1)


def test_autocasts_mixture_is_taken_and_others_are_torchs() -> None:
    norm, theirs, _ = norms(24, torch.float32)
    branch, x, _ = drawn(24, torch.bfloat16)
    out = norm(branch, x, None)  # the weights are float32
    assert torch.equal(out, norm(branch.float(), x.float(), None).bfloat16())  # rounded once
    assert torch.equal(norm(branch, x.float(), None), theirs(branch, x.float(), None))
    norm, theirs, branch, x = norm.double(), theirs.double(), branch.double(), x.double()
    assert torch.equal(norm(branch, x, None), theirs(branch, x, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_depend_on_no_number_of_threads_and_no_other_row(dtype: torch.dtype) -> None:
    norm, _, _ = norms(96, dtype)
    inputs = drawn(96, dtype, tokens=1500)  # several pieces
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(norm, inputs, SHARES))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = results(norm, tuple(each[1:2, 7:9] for each in inputs), SHARES[1:2])
    assert all(torch.equal(a, b[1:2, 7:9]) for a, b in zip(alone[:3], found[0][:3], strict=True))


def test_what_is_not_finite_stays_in_its_row() -> None:
    norm, _, _ = norms(24, torch.float32)
    branch, x, _ = drawn(24, torch.float32)
    branch[1, 3, 5] = float("nan")
    out = norm(branch, x, None)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 24


def test_the_branch_and_two_numbers_a_row_are_kept() -> None:
    norm, _, _ = norms(24, torch.float32)
    branch, x, _ = (each.requires_grad_() for each in drawn(24, torch.float32))
    assert saved_bytes(lambda: norm(branch, x, None), norm.parameters()) == 3 * 17 * (24 + 2) * 4


def test_nothing_at_all_has_gradients_of_zero() -> None:
    norm, _, _ = norms(24, torch.float32)
    empty = torch.empty(0, 17, 24)
    out, *_, weight, bias = results(norm, (empty, empty, empty), None)
    assert out.shape == empty.shape
    assert not weight.any()
    assert not bias.any()


def test_what_it_cannot_take_is_refused() -> None:
    operator = torch.ops.swinv2_scale.add_layer_norm
    x, weight = torch.ones(2, 3, 4), torch.ones(4)
    for branch in (x.double(), x.transpose(0, 1)):
        with pytest.raises(RuntimeError, match="x must be contiguous float32 or bfloat16"):
            operator(branch, branch, None, weight, weight, 1e-5)
    for words, wrong in (
        ("x must be as branch", (x[:1], x, None, weight, weight)),
        ("x must be as branch", (x.bfloat16(), x, None, weight, weight)),
        ("share must be contiguous float32", (x, x, torch.ones(3), weight, weight)),
        ("weight must be contiguous float32", (x, x, None, torch.ones(3), weight)),
        ("bias must be contiguous float32", (x, x, None, weight, weight.double())),
        ("branch must be", (x[0, 0], x[0, 0], None, weight, weight)),
    ):
        with pytest.raises(RuntimeError, match=words):
            operator(*wrong, 1e-5)


def test_opcheck_finds_nothing() -> None:
    x, branch = (torch.randn(2, 5, 24, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(24, requires_grad=True) for _ in range(2))
    for share in (None, torch.tensor([0.0, 2.0])):
        torch.library.opcheck(torch.ops.swinv2_scale.add_layer_norm.default, (x, branch, share, weight, bias, 1e-5))
    assert fused.takes(x)
