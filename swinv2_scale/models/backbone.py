"""The Swin V2 backbone.

Shapes: images (B, C_in, H, W); tokens (B, L, C) in row-major order of a map; the map halves and C doubles per stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.config.model import ModelConfig, PretrainedWindows
from swinv2_scale.geometry import Size
from swinv2_scale.models import linear
from swinv2_scale.models.block import Block
from swinv2_scale.models.linear import Library, Linear
from swinv2_scale.models.ops.attend import resolve


class PatchEmbed(nn.Module):
    """Cut an image into patches, one token each; images that don't divide are zero-padded right and bottom."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Size]:
        """(B, C_in, H, W) -> (B, L, C) and the map's size."""
        height, width = images.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        x = self.proj(F.pad(images, padding) if any(padding) else images)
        map_size = (int(x.shape[2]), int(x.shape[3]))
        return self.norm(x.flatten(2).transpose(1, 2)), map_size


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width: reduction first, then the norm (V1 had it before)."""

    def __init__(self, dim: int, library: Library = "torch") -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, library=library)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, map_size: Size) -> tuple[Tensor, Size]:
        batch, _, dim = x.shape
        height, width = map_size
        x = x.view(batch, height, width, dim)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        merged = torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), -1)
        return self.norm(self.reduction(merged.flatten(1, 2))), (int(merged.shape[1]), int(merged.shape[2]))


class Stage(nn.Module):
    """Blocks of one resolution, and the merging that ends the stage (none in the last)."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        dim = config.stage_dims[stage]
        first = sum(config.depths[:stage])
        attend = resolve(config.stage_backends[stage], config.attention.max_score_bytes)
        library = linear.resolve(config.linear)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=config.num_heads[stage],
                window_size=config.window_shape,
                pretrained_window=config.stage_pretrained_windows[stage],
                attend=attend,
                library=library,
                mlp_ratio=config.mlp_ratio,
                drop_path=config.drop_path_rates[first + i],
                index=first + i,
                shifted=i % 2 == 1,
                extra_norm=config.has_extra_norm(stage, i),
            )
            for i in range(config.depths[stage])
        )
        self.downsample = PatchMerging(dim, library) if stage + 1 < config.num_stages else None

    def forward(self, x: Tensor, map_size: Size, drop_keys: Tensor | None = None) -> Tensor:
        """The stage's own level, (B, L, C); merging is the caller's, so that dense heads see every level."""
        for block in self.blocks:
            x = block(x, map_size, drop_keys)
        return x


class SwinV2(nn.Module):
    """Swin Transformer V2 (arXiv 2111.09883), named like the released code so that its weights fit by name.

    Parameters are left uninitialised; ``initial_value`` in initialise.py gives each its first value by name.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        #: Loaded weights bring their own pretrained windows, unless the constructor was given some.
        self.windows_are_given = any(config.pretrained_window_sizes or ())
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.embed_dim)
        self.layers = nn.ModuleList(Stage(config, stage) for stage in range(config.num_stages))
        self.norm = nn.LayerNorm(config.stage_dims[-1])
        self.head = nn.Linear(config.stage_dims[-1], config.num_classes) if config.num_classes else None

    def inherit_pretrained_windows(self, sizes: PretrainedWindows) -> None:
        """Take the windows that loaded weights were first trained with: one entry a stage, a number or (h, w)."""
        self.config = self.config.model_copy(update={"pretrained_window_sizes": sizes})
        for stage, window in zip(self.layers, self.config.stage_pretrained_windows, strict=True):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                assert isinstance(block, Block)
                block.attn.cpb_mlp.pretrained_window = window

    def forward_levels(self, x: Tensor, map_size: Size, drop_keys: Tensor | None = None) -> list[tuple[Tensor, Size]]:
        """Tokens after patch embedding -> ((B, L, C), map size) of every stage, the last one not normalised.

        Args:
            drop_keys: int64 (B,) to draw drop path from; None drops nothing (as in evaluation).
        """
        levels = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            x = stage(x, map_size, drop_keys)
            levels.append((x, map_size))
            if stage.downsample is not None:
                x, map_size = stage.downsample(x, map_size)
        return levels

    def forward_features_pyramid(self, images: Tensor) -> list[Tensor]:
        """Images -> one (B, C, h, w) map a stage, the last one normalised."""
        x, map_size = self.patch_embed(images)
        levels = self.forward_levels(x, map_size, self._keys(images))
        levels[-1] = (self.norm(levels[-1][0]), levels[-1][1])
        return [x.transpose(1, 2).reshape(len(x), x.shape[2], *size) for x, size in levels]

    def forward_features(self, images: Tensor) -> Tensor:
        """Images -> (B, C): the normalised last level, averaged over its tokens."""
        x, map_size = self.patch_embed(images)
        x, _ = self.forward_levels(x, map_size, self._keys(images))[-1]
        pooled: Tensor = self.norm(x).mean(1)
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Images -> (B, num_classes) logits, or the pooled features where there is no head."""
        features = self.forward_features(images)
        return features if self.head is None else self.head(features)

    def _keys(self, images: Tensor) -> Tensor | None:
        """Drop-path keys from torch's generator, for use outside our training (which hands its own in)."""
        if not self.training or self.config.drop_path_rate == 0.0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (len(images),), device=images.device)
