"""Weights for a model that differs where it may: other classes, other channels, other windows."""

from __future__ import annotations

import torch
from torch import Tensor

from swinv2_scale.config.model import ModelConfig, PretrainedWindows


def adapt_channels(weight: Tensor, in_channels: int) -> Tensor:
    """A patch convolution for RGB as one for other channels.

    One channel: the sum over RGB, so that a channel gives the same tokens as three equal (normalised) ones did. More:
    RGB repeated in turn and scaled by 3 / channels, so that tokens keep their size. The rule is timm's.

    Args:
        weight: (C, 3, patch, patch).

    Returns:
        (C, in_channels, patch, patch), float32 (float64 for float64).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_channels == 1:
        return wide.sum(1, keepdim=True)
    turns = torch.arange(in_channels, device=weight.device) % 3
    return wide[:, turns] * (3 / in_channels)


def inherit_windows(
    config: ModelConfig, known: PretrainedWindows | None, where: str
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model's configuration with the pretrained windows that its weights were trained with, and warnings.

    They are inherited word for word: the scale of the position bias is that of the first pre-training for ever. Windows
    that the configuration spells out win.

    Args:
        known: those of the weights; None where nobody knows.
    """
    if not any(config.pretrained_window_sizes or ()):
        if known is not None:
            return config.model_copy(update={"pretrained_window_sizes": known}), ()
        settled = config.settled
        return settled, (
            f"{where} doesn't say with which windows it was pre-trained; this model's own are taken, "
            f"{list(settled.pretrained_window_sizes or ())}. If they were others, give pretrained_window_sizes",
        )
    settled = config.settled
    if known is not None and settled.pretrained_window_sizes != known:
        return settled, (
            f"pretrained_window_sizes are given as {list(settled.pretrained_window_sizes or ())}, but {where} was "
            f"trained with {list(known)}: its position bias is read at another scale",
        )
    return settled, ()
