"""Log-spaced continuous position bias: a small MLP from relative offsets to one bias a head."""

from __future__ import annotations

import math
from functools import lru_cache

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


class WideLinear(nn.Linear):
    """A Linear that computes in float32 (float64 for float64) whatever type its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        wide = wide_type(self.weight.dtype)
        return F.linear(input.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


class PositionBias(nn.Sequential):
    """The MLP of the continuous position bias; a Sequential so that its weights have the released names.

    Args:
        num_heads: biases made for each offset.
        pretrained_window: window of the first pre-training in this stage, along each axis (2 for images, 3 for video).
    """

    def __init__(self, num_heads: int, pretrained_window: Size) -> None:
        super().__init__(
            WideLinear(len(pretrained_window), 512), nn.ReLU(inplace=True), WideLinear(512, num_heads, bias=False)
        )
        self.pretrained_window = pretrained_window

    def table(self, window_size: Size, device: torch.device) -> Tensor:
        """(N, 2*h-1, 2*w-1) float32: 16 * sigmoid of the MLP, for the effective ``window_size``."""
        divisor = coordinate_divisor(self.pretrained_window)
        with without_autocast(device):
            values = self(log_spaced_offsets(window_size, divisor, device))
            return 16 * torch.sigmoid(values).movedim(-1, 0)
