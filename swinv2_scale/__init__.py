"""Swin Transformer V2, pre-trained and fine-tuned from Tiny to the 3-billion-parameter SwinV2-G."""

from importlib import import_module
from importlib.metadata import version as _version
from typing import Any

_EXPORTS = {
    "create_model": "swinv2_scale.models.factory",
    "list_models": "swinv2_scale.models.factory",
    "load_weights": "swinv2_scale.weights.api",
    "save_weights": "swinv2_scale.weights.api",
}

__all__ = ["__version__", "create_model", "list_models", "load_weights", "save_weights"]


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562): `swinv2-scale config check` must answer without importing torch.
    if name == "__version__":
        return _version("swinv2-scale")
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
