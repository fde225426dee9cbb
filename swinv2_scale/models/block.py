"""One Swin V2 block: cosine window attention and an MLP, each normalised *after* it, before the residual addition.

Shapes: x is (B, L, C), tokens of one map in row-major order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swinv2_scale import draws
from swinv2_scale.geometry import Size
from swinv2_scale.models.linear import GeluLinear, Library, Linear
from swinv2_scale.models.norm import ResidualPostNorm
from swinv2_scale.models.ops.attend import Attend
from swinv2_scale.models.ops.fused import fused
from swinv2_scale.models.position_bias import PositionBias
from swinv2_scale.models.precision import wide_type
from swinv2_scale.models.tiles import Tiling, tiling

#: Temperature of a fresh head, and the largest multiplier: the paper keeps tau above 0.01.
INITIAL_LOGIT_SCALE = math.log(10.0)
MAX_LOGIT_SCALE = math.log(100.0)


class WindowAttention(nn.Module):
    """Scaled cosine attention inside windows; holds the parameters, hands the arithmetic to a backend."""

    def __init__(
        self, dim: int, num_heads: int, window_size: Size, pretrained_window: Size, attend: Attend, library: Library
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.attend = attend
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = PositionBias(num_heads, pretrained_window)
        # Queries and values have a bias, keys don't; it is handed in (sec. "qkv" of the released code).
        self.qkv = Linear(dim, 3 * dim, bias=False, library=library)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.proj = Linear(dim, dim, library=library)

    def forward(self, x: Tensor, table: Tensor, tiles: Tiling) -> Tensor:
        """
        Args:
            x: (B, L, C).
            table: of ``cpb_mlp``, for the window of ``tiles``.
            tiles: of x's map.
        """
        batch, length, dim = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, bias).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        scale = self.logit_scale.to(wide_type(self.logit_scale.dtype)).clamp(max=MAX_LOGIT_SCALE).exp().flatten()
        out: Tensor = self.proj(self.attend(qkv, scale, table, tiles).reshape(batch, length, dim))
        return out


class Mlp(nn.Module):
    """Linear, GELU (erf), Linear; of the two wide tensors between them the first is kept."""

    def __init__(self, dim: int, hidden: int, library: Library, kernels: bool = False) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, library=library)
        self.fc2 = GeluLinear(hidden, dim, library=library, kernels=kernels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


class Block(nn.Module):
    """x + norm1(attention(x)), then x + norm2(mlp(x)); every few blocks of H and G a norm3 on the main branch.

    Args:
        index: the block's number in the whole model; picks its drop-path numbers.
        shifted: True for every second block of a stage.
        drop_path: probability of dropping a branch for a sample.
        library: what multiplies in its Linears.
        attend: attention's backend; with ``fused`` our kernels compute the MLP's GELU and the norms, too.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: Size,
        pretrained_window: Size,
        attend: Attend,
        library: Library,
        mlp_ratio: float,
        drop_path: float,
        index: int,
        shifted: bool,
        extra_norm: bool,
    ) -> None:
        super().__init__()
        self.index, self.shifted, self.drop_path_rate = index, shifted, drop_path
        self.attn = WindowAttention(dim, num_heads, window_size, pretrained_window, attend, library)
        self.norm1 = ResidualPostNorm(dim, kernels=attend is fused)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), library, kernels=attend is fused)
        self.norm2 = ResidualPostNorm(dim, kernels=attend is fused)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, map_size: Size, drop_keys: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, L, C).
            map_size: tokens along each axis, their product is L.
            drop_keys: int64 (B,), what each sample's drop path is drawn from; None drops nothing.
        """
        tiles = tiling(map_size, self.attn.window_size, self.shifted, x.device)
        table = self.attn.cpb_mlp.table(tiles.window_size, x.device)
        x = self.attend(x, table, tiles, self._share(drop_keys, 0))
        return self.feed_forward(x, self._share(drop_keys, 1))

    def attend(self, x: Tensor, table: Tensor, tiles: Tiling, share: Tensor | None) -> Tensor:
        """The first half: what model.compile makes one piece of, as the second. See forward() and _share()."""
        out: Tensor = self.norm1(self.attn(x, table, tiles), x, share)
        return out

    def feed_forward(self, x: Tensor, share: Tensor | None) -> Tensor:
        """The second half, and the extra norm where there is one."""
        x = self.norm2(self.mlp(x), x, share)
        return x if self.norm3 is None else self.norm3(x)

    def _share(self, drop_keys: Tensor | None, which: int) -> Tensor | None:
        """float32 (B, 1, 1): what of a branch is added to each sample, 0 where drop path drops it. None: everything."""
        # A dropped branch is computed all the same: under ZeRO-3 every rank must call the same modules.
        if drop_keys is None or self.drop_path_rate == 0.0:
            return None
        kept = draws.uniform(drop_keys, 2 * self.index + which) >= self.drop_path_rate
        return (kept / (1 - self.drop_path_rate))[:, None, None]
