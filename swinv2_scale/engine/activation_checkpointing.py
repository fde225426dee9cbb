"""Recompute blocks in backward: torch's non-reentrant checkpoint, or fairscale's wrapper."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from swinv2_scale.config.run import ActivationCheckpointingConfig
from swinv2_scale.models.block import Block


def apply(model: nn.Module, config: ActivationCheckpointingConfig) -> None:
    """Checkpoint every Swin block of a model, in place; parameter names stay as they are.

    Nothing random is recomputed differently: drop path is drawn from keys that are inputs of the block, so neither
    library has to save a generator's state.
    """
    if config.backend == "none":
        return
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if config.backend == "torch":
            block.forward = partial(_torch_checkpoint, block.forward)  # type: ignore[method-assign]
        else:
            with warnings.catch_warnings():
                # fairscale 0.4.13 decorates with torch.cuda.amp names that torch has renamed.
                warnings.simplefilter("ignore", FutureWarning)
                from fairscale.nn.checkpoint import checkpoint_wrapper
            checkpoint_wrapper(block, offload_to_cpu=config.offload)


def _torch_checkpoint(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
