"""Linears: which library multiplies, and what they keep for backward.

``torch``: ``F.linear``, which on x86 CPUs hands float32 to MKL. ``onednn``: float32 on CPUs through oneDNN, which torch
has inside for bfloat16; everything else as ``torch``. MKL is slow on CPUs that aren't Intel's: both libraries' rates
are in benchmarks/results/linear_*.md.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.errors import ConfigError
from swinv2_scale.models.ops import fused
from swinv2_scale.models.precision import autocast_kind
from swinv2_scale.telemetry.console import log

Library = Literal["torch", "onednn"]
_CPUINFO = Path("/proc/cpuinfo")


def resolve(name: str) -> Library:
    """The library behind ``model.linear``; called once, in a constructor.

    Raises:
        ConfigError: oneDNN is asked for, and this torch was built without it.
    """
    if name == "auto":
        return choose()
    if name == "onednn" and not _has_onednn():
        raise ConfigError(f"model.linear is onednn: torch {torch.__version__} has no oneDNN here", "set it to torch")
    return "onednn" if name == "onednn" else "torch"


@cache
def choose() -> Library:
    """What ``auto`` means: oneDNN where MKL is what torch has and the CPU is x86, but not Intel's. Nothing is timed, so
    that the same machine gives the same bits. Said once in the log."""
    vendor = _cpu_vendor()
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if vendor in ("", "GenuineIntel") or not has_mkl or not _has_onednn():
        return "torch"
    if not torch.cuda.is_available():
        log().info("linear layers: auto takes onednn for float32 (the CPU is %s, where MKL is slow)", vendor)
    return "onednn"


def _cpu_vendor() -> str:
    """As x86 CPUs spell it; empty where there is no such thing."""
    try:
        lines = _CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _has_onednn() -> bool:
    is_built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_built_in and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """A Linear whose float32 products go through ``library``.

    The bias may be handed in, for layers that are made of several; at ZeRO-3 its own is brought when it is called.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, library: Library = "torch") -> None:
        super().__init__(in_features, out_features, bias)
        self.library = library

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        if self.library == "onednn" and _is_onednns(input, self.weight):
            return _OneDnn.apply(input, self.weight, bias)  # type: ignore[no-any-return]
        return F.linear(input, self.weight, bias)


class GeluLinear(Linear):
    """A Linear of the GELU (erf) of its input. It keeps the input alone: the GELU is computed again in backward.

    Args:
        kernels: the GELU is computed by ours (ops/fused.py, loaded), where they take its type.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        library: Library = "torch",
        kernels: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, library=library)
        self.kernels = kernels

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        is_onednn = self.library == "onednn" and _is_onednns(input, self.weight)
        kernels = self.kernels and fused.takes(input)
        return _Gelu.apply(input, self.weight, bias, is_onednn, kernels)  # type: ignore[no-any-return]


def _is_onednns(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes it; its products have one row at least."""
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_float32 and x.device.type == "cpu" and x.numel() > 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in float32, by oneDNN."""
    multiply = _opaque_product if torch.compiler.is_compiling() else _onednn_product
    out: Tensor = multiply(x, weight, bias)
    return out


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# What torch.compile sees: torch 2.15's inductor compiles oneDNN's own operation for weights that never change alone.
@torch.library.custom_op("swinv2_scale::onednn_product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn_product(x, weight, bias)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# A weight is saved as it came: at ZeRO-3 a parameter that has no values until backward brings them. A view of it, as
# torch's own Linear saves, would hold on to them all the time (deepspeed/runtime/zero/linear.py does the same).


class _OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = _input_gradient(grads[0], weight, True) if ctx.needs_input_grad[0] else None
        return dx, *_parameter_gradients(grads[0], x, ctx.needs_input_grad, True)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_onednn: bool, kernels: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.is_onednn, ctx.kernels = is_onednn, kernels
        kind = autocast_kind(x.device)
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        gelu = fused.gelu(x) if kernels else F.gelu(x)
        return _product(gelu, weight, bias) if is_onednn else F.linear(gelu, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kind, dtype, enabled = ctx.autocast
        # Autograd runs this outside of the forward's autocast, which casts the weight.
        with torch.autocast(kind, dtype, enabled=enabled):
            dgelu = _input_gradient(grads[0], weight, ctx.is_onednn)
            if ctx.kernels:
                gelu, dx = fused.gelu_backward(x, dgelu.to(x.dtype))
            else:
                gelu, dx = F.gelu(x), torch.ops.aten.gelu_backward(dgelu, x)
            dweight, dbias = _parameter_gradients(grads[0], gelu, ctx.needs_input_grad, ctx.is_onednn)
        return dx, dweight, dbias, None, None


def _input_gradient(grad: Tensor, weight: Tensor, is_onednn: bool) -> Tensor:
    rows = grad.flatten(0, -2)
    found = _product(rows, weight.t(), None) if is_onednn else rows @ weight
    return found.view(*grad.shape[:-1], weight.shape[1])


def _parameter_gradients(
    grad: Tensor, x: Tensor, needed: tuple[bool, ...], is_onednn: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of a Linear's weight and bias; ``needed`` is autograd's, of (x, weight, bias)."""
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    dweight = dbias = None
    if needed[1]:
        dweight = _weight_product(rows, inputs) if is_onednn else rows.t() @ inputs
    if needed[2]:
        dbias = rows.sum(0)
    return dweight, dbias


def _weight_product(rows: Tensor, inputs: Tensor) -> Tensor:
    """rows.T @ inputs; oneDNN is up to 1.5 times as fast with the shorter side first."""
    if rows.shape[1] <= inputs.shape[1]:
        return _product(rows.t(), inputs.t(), None)
    return _product(inputs.t(), rows.t(), None).t()
