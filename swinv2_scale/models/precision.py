"""Types that arithmetic is done in, whatever the model is kept in."""

from __future__ import annotations

import torch


def autocast_kind(device: torch.device) -> str:
    """Whose autocast counts on a device; the meta device, which autocast doesn't know, is a CPU."""
    return "cpu" if device.type == "meta" else device.type


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which nothing is cast."""
    return torch.autocast(autocast_kind(device), enabled=False)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
