"""Log-spaced continuous position bias: a small MLP from relative offsets to one bias a head."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.geometry import Size, coordinate_divisor
from swinv2_scale.models.precision import wide_type, without_autocast


@lru_cache(maxsize=128)
def log_spaced_offsets(window_size: Size, divisor: Size, device: torch.device) -> Tensor:
    """Relative (dy, dx) offsets inside a window, log-spaced, as the bias MLP reads them.

    An offset of one full pre-training window maps to +-log2(9)/3 whatever ``window_size`` is, so weights from
    12x12 windows extrapolate by a few tenths at most when run with 24x24 windows.

    Returns:
        float32 (2*h-1, 2*w-1, 2), last axis (dy, dx), ascending. Float32 in every model, as the released weights were
        trained: float64 offsets differ from every public implementation by 1e-7.
    Source: Swin V2 (arXiv 2111.09883) sec. 3.3; the factor 8 and the base-8 log are in the released code only.
    """
    with torch.inference_mode(False):
        axes = [
            torch.arange(-(length - 1), length, dtype=torch.float32, device="cpu") / scale
            for length, scale in zip(window_size, divisor, strict=True)
        ]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) * 8
        return (torch.sign(offsets) * torch.log2(offsets.abs() + 1.0) / math.log2(8)).to(device)


#: Rows of offsets that a CPU computes at once: their hidden layer stays in its second-level cache.
_CPU_ROWS = 256


class _OffsetMlp(torch.autograd.Function):
    """Linear, ReLU, Linear in float32 (float64 for float64 weights). Its hidden layer is computed again in backward:
    for windows of 48 it would be the most that a block keeps.

    As of a Linear, the weights are saved as they came (see linear.py).
    """

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, weight: Tensor, bias: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, weight, bias, last)
        layers = _widened(weight, bias, last)
        return torch.cat([_hidden(rows, *layers[:2]) @ layers[2].t() for rows in _blocks(offsets.to(layers[0].dtype))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        offsets, *parameters = ctx.saved_tensors
        with without_autocast(offsets.device):
            weight, bias, last = _widened(*parameters)
            offsets = offsets.to(weight.dtype)
            # One product for the first layer's weights and bias, as those of an offset that is always 1.
            rows_with_one = F.pad(offsets, (0, 1), value=1.0)
            first, second = weight.new_zeros(rows_with_one.shape[1], len(weight)), torch.zeros_like(last)
            for rows, ones, grad in zip(*map(_blocks, (offsets, rows_with_one, grads[0])), strict=True):
                hidden = _hidden(rows, weight, bias)
                second.addmm_(grad.t(), hidden)
                first.addmm_(ones.t(), torch.ops.aten.threshold_backward(grad @ last, hidden, 0))
        found = first[:-1].t(), first[-1], second
        return None, *(grad.to(parameter.dtype) for grad, parameter in zip(found, parameters, strict=True))


def _widened(*parameters: Tensor) -> list[Tensor]:
    return [parameter.to(wide_type(parameter.dtype)) for parameter in parameters]


def _hidden(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(rows, weight, bias).relu_()


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, _CPU_ROWS if rows.device.type == "cpu" else len(rows))


class PositionBias(nn.Sequential):
    """The MLP of the continuous position bias; a Sequential so that its weights have the released names.

    Args:
        num_heads: biases made for each offset.
        pretrained_window: window of the first pre-training in this stage, along each axis (2 for images, 3 for video).
    """

    def __init__(self, num_heads: int, pretrained_window: Size) -> None:
        super().__init__(nn.Linear(len(pretrained_window), 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.pretrained_window = pretrained_window

    def table(self, window_size: Size, device: torch.device) -> Tensor:
        """(N, 2*h-1, 2*w-1) float32: 16 * sigmoid of the MLP, for the effective ``window_size``."""
        divisor = coordinate_divisor(self.pretrained_window)
        offsets = log_spaced_offsets(window_size, divisor, device)
        with without_autocast(device):
            values: Tensor = _OffsetMlp.apply(offsets.flatten(0, -2), self[0].weight, self[0].bias, self[2].weight)
            return 16 * torch.sigmoid(values).t().view(-1, *offsets.shape[:-1])
