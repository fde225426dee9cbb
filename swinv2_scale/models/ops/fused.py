"""``fused``: attention on CPUs by our own kernels (csrc/), forward and backward without a matrix of queries x keys.

Kept for backward are qkv, the output and one number a token and head (the logarithm of the softmax's sum). The same
input gives the same bits for any number of threads. ``swinv2-scale kernels build`` compiles them; nothing here does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinv2_scale.errors import ConfigError
from swinv2_scale.models.ops import build
from swinv2_scale.models.precision import wide_type
from swinv2_scale.models.tiles import Tiling

#: From the best to what runs everywhere.
KERNELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")


def fused(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling) -> Tensor:
    """See the contract in attend.py. float16 takes a float32 copy; load() comes first."""
    if qkv.dtype == torch.float16:
        return fused(qkv.float(), logit_scale, bias_table, tiles).half()
    num_tiles = [group.num_tiles for group in tiles.groups]
    sides = [side for group in tiles.groups for side in group.shape]
    wide = wide_type(qkv.dtype)
    out, _ = torch.ops.swinv2_scale.window_attention(
        qkv.contiguous(),
        logit_scale.to(wide).contiguous(),
        bias_table.to(wide).contiguous(),
        tiles.order,
        num_tiles,
        sides,
    )
    return out  # type: ignore[no-any-return]


def load() -> str:
    """Load the kernels and choose those of this CPU; returns their name.

    Raises:
        ConfigError: they are not built, or what was built can't be loaded.
    """
    path = build.find()
    if path is None:
        raise ConfigError(
            f"model.attention.backend fused: it is not built for torch {torch.__version__} in "
            f"{' or '.join(map(str, build.places()))}",
            "run `swinv2-scale kernels build` (a C++ compiler is needed), or choose auto, eager or sequential",
        )
    return _load(path)


@cache
def _load(path: Path) -> str:
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        message = f"model.attention.backend fused: {path} can't be loaded: {error}"
        raise ConfigError(message, "delete it and run `swinv2-scale kernels build`") from None
    _register()
    name = best(torch.backends.cpu.get_cpu_capability(), torch.ops.swinv2_scale.usable_kernels())
    torch.ops.swinv2_scale.select_kernels(name)
    return name


def best(capability: str, usable: list[str]) -> str:
    """The kernels to take: of those that the CPU can run, the best that torch's capability allows.

    It heeds the environment's ATEN_CPU_CAPABILITY, so that torch and we use the same instructions.
    """
    allowed = {"AVX512": KERNELS, "AVX2": KERNELS[3:]}.get(capability, KERNELS[-1:])
    return next(name for name in allowed if name in usable)


def takes(x: Tensor) -> bool:
    """Whether gelu() and add_layer_norm() are for such a tensor; load() comes first."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def gelu(x: Tensor) -> Tensor:
    """GELU (erf); no autograd, see linear.py."""
    return torch.ops.swinv2_scale.gelu(x.contiguous())  # type: ignore[no-any-return]


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x), and from the gradient of that the one of x, in its place where it is contiguous."""
    grad = grad.contiguous()
    return torch.ops.swinv2_scale.gelu_backward(x.contiguous(), grad), grad


def add_layer_norm(x: Tensor, branch: Tensor, share: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + share * LayerNorm(branch) in one pass.

    Args:
        x, branch: (samples, .., channels), of one type that takes() takes.
        share: float32 (samples), or None for 1; gets no gradient.
        weight, bias: (channels), of any floating-point type.
    """
    wide = weight.float(), bias.float()
    share = None if share is None else share.contiguous()
    out, _, _ = torch.ops.swinv2_scale.add_layer_norm(x.contiguous(), branch.contiguous(), share, *wide, eps)
    return out  # type: ignore[no-any-return]


def _register() -> None:
    """What torch.compile and autograd know about the operators."""
    torch.library.register_fake("swinv2_scale::add_layer_norm", _norm_shapes)
    torch.library.register_fake("swinv2_scale::add_layer_norm_backward", _norm_backward_shapes)
    torch.library.register_autograd("swinv2_scale::add_layer_norm", _norm_backward, setup_context=_keep_norm)
    torch.library.register_fake("swinv2_scale::gelu", torch.empty_like)
    torch.library.register_fake("swinv2_scale::gelu_backward", lambda x, grad: torch.empty_like(x))
    torch.library.register_fake("swinv2_scale::window_attention", _shapes)
    torch.library.register_fake("swinv2_scale::window_attention_backward", _backward_shapes)
    torch.library.register_autograd("swinv2_scale::window_attention", _backward, setup_context=_keep)


def _shapes(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, order: Tensor, num_tiles: list[int], sides: list[int]
) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, dim = qkv.shape
    return qkv.new_empty((batch, length, heads, dim)), logit_scale.new_empty((batch, heads, length))


def _backward_shapes(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    order: Tensor,
    num_tiles: list[int],
    sides: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(logit_scale), torch.empty_like(bias_table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, logit_scale, bias_table, order, ctx.num_tiles, ctx.sides = inputs
    ctx.save_for_backward(qkv, *output, logit_scale, bias_table, order)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.swinv2_scale.window_attention_backward(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.num_tiles, ctx.sides
    )
    return *gradients, None, None, None


def _norm_shapes(
    x: Tensor, branch: Tensor, share: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.new_empty(branch.numel() // branch.shape[-1])
    return torch.empty_like(branch), rows, torch.empty_like(rows)


def _norm_backward_shapes(
    grad: Tensor, branch: Tensor, share: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(branch), torch.empty_like(weight), torch.empty_like(weight)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, branch, share, weight, _, _ = inputs
    ctx.save_for_backward(branch, share, weight, *output[1:])


def _norm_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad.contiguous()
    branch, weight, bias = torch.ops.swinv2_scale.add_layer_norm_backward(grad, *ctx.saved_tensors)
    return grad, branch, None, weight, bias, None
