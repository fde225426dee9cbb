"""Residual post normalisation (arXiv 2111.09883, sec. 3.2): a branch is normalised, then added to the main branch."""

from __future__ import annotations

from torch import Tensor, nn

from swinv2_scale.models.ops import fused


class ResidualPostNorm(nn.LayerNorm):
    """x + share * LayerNorm(branch).

    Args:
        kernels: it is computed in one pass by ours (ops/fused.py, loaded), where they take its type.
    """

    def __init__(self, dim: int, kernels: bool = False) -> None:
        super().__init__(dim)
        self.kernels = kernels

    def forward(self, branch: Tensor, x: Tensor, share: Tensor | None) -> Tensor:  # type: ignore[override]
        """
        Args:
            branch, x: (B, L, C).
            share: float32 (B, 1, 1), what of the branch is added to each sample; None adds all of it.
        """
        if self.kernels and branch.dtype == x.dtype and fused.takes(branch):
            shares = None if share is None else share.flatten()
            return fused.add_layer_norm(x, branch, shares, self.weight, self.bias, self.eps)
        normal = super().forward(branch)
        return x + (normal if share is None else normal * share.to(normal.dtype))
