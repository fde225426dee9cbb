"""Linears: the same numbers from every library, and no wide tensor kept twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from swinv2_scale.errors import ConfigError
from swinv2_scale.models import linear
from swinv2_scale.models.block import Mlp
from swinv2_scale.models.factory import create_model
from swinv2_scale.models.linear import GeluLinear, Library, Linear
from tests.support.live_memory import saved_bytes

torch.set_num_threads(1)

LIBRARIES: tuple[Library, ...] = ("torch", "onednn")
#: (rows of the input, in, out): more inputs than outputs, fewer, one row, none.
SHAPES = {
    "narrowing": ((3, 50), 96, 32),
    "widening": ((2, 5, 7), 24, 72),
    "one row": ((1,), 8, 8),
    "none": ((0,), 8, 4),
}


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and the gradients of input and parameters, of a loss that differs from number to number."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    (out.float().sin().sum() if out.dtype != torch.float64 else out.sin().sum()).backward()
    return [out.detach(), *(t.grad.clone() for t in (x, *layer.parameters()) if t.grad is not None)]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Each tensor differs by so much of its own norm at most, and has the other's type."""
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and float((a - b).norm()) <= tolerance * float(b.norm())
        for a, b in zip(found, wanted, strict=True)
    )


def filled(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_and_one_of_the_gelu_are_torchs(shape: str, library: Library, bias: bool) -> None:
    rows, num_in, num_out = SHAPES[shape]
    for kind, plain in ((Linear, nn.Identity()), (GeluLinear, nn.GELU())):
        layer = filled(kind(num_in, num_out, bias, library=library))
        wanted = nn.Sequential(plain, nn.Linear(num_in, num_out, bias))
        wanted[1].load_state_dict(layer.state_dict())
        x = torch.randn(*rows, num_in, generator=torch.Generator().manual_seed(1))
        # Sums of a hundred and fifty terms at most, in another order; float64 is torch's own in both.
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
            layer.to(dtype), wanted.to(dtype)
            assert agree(results(layer, x.to(dtype)), results(wanted, x.to(dtype)), tolerance)


@pytest.mark.parametrize("library", LIBRARIES)
def test_bfloat16_and_autocast_are_torchs_own_products_to_the_bit(library: Library) -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    layer = filled(nn.Sequential(Linear(24, 48, library=library), GeluLinear(48, 24, library=library)))
    wanted = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
    for own, other in zip(layer.parameters(), wanted.parameters(), strict=True):
        other.data.copy_(own.data)
    with torch.autocast("cpu", torch.bfloat16):
        assert agree(results(layer, x), results(wanted, x), 0)
    layer.bfloat16(), wanted.bfloat16()
    assert agree(results(layer, x.bfloat16()), results(wanted, x.bfloat16()), 0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_input_gives_the_same_bits_and_so_does_recomputing(library: Library) -> None:
    mlp = filled(Mlp(24, 96, library))
    x = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(1))

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.mlp, x, use_reentrant=False)
            return out

    first = results(mlp, x)
    for again in (results(mlp, x), results(Recomputed(), x)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_keeps_its_input_and_one_wide_tensor(dtype: torch.dtype, library: Library) -> None:
    mlp = filled(Mlp(24, 96, library)).to(dtype)
    x = torch.randn(2, 50, 24, dtype=dtype, requires_grad=True)
    # torch's own Linear, GELU, Linear keep 24 + 96 + 96 numbers a token.
    assert saved_bytes(lambda: mlp(x), mlp.parameters()) == 100 * (24 + 96) * dtype.itemsize


@pytest.mark.parametrize("library", LIBRARIES)
def test_saved_weights_are_the_parameters_themselves(library: Library) -> None:
    # ZeRO-3 takes a parameter's values away after forward: what keeps a view of them would keep them in memory.
    layer, kept = GeluLinear(8, 4, library=library), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(id(t)) or t, lambda t: t):
        layer(torch.randn(3, 8, requires_grad=True))
    assert id(layer.weight) in kept


def test_a_model_gives_the_same_numbers_with_either_library() -> None:
    fields = {"image_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = [results(filled(create_model("swinv2_tiny", **fields, linear=library)), x) for library in LIBRARIES]
    # Float32 through four blocks; the cosine attention's scale multiplies what rounding has left.
    assert agree(found[1], found[0], 1e-4)


@pytest.mark.parametrize(
    ("cpuinfo", "chosen"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "onednn"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "torch"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "torch"),
        (None, "torch"),
    ],
)
def test_auto_takes_onednn_on_x86_cpus_that_are_not_intels(
    cpuinfo: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(linear, "_CPUINFO", path)
    assert linear.choose.__wrapped__() == chosen


def test_onednn_is_refused_by_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert linear.resolve("torch") == "torch"
    with pytest.raises(ConfigError, match=r"model\.linear is onednn") as error:
        linear.resolve("onednn")
    assert error.value.next_step == "set it to torch"


def test_products_of_float32_really_go_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(F, "linear", lambda *inputs: calls.append(inputs))
    layer = Linear(8, 4, library="onednn")
    assert layer(torch.randn(3, 8)).shape == (3, 4)
    assert calls == []
    layer.double()(torch.randn(3, 8, dtype=torch.float64))
    assert len(calls) == 1
