"""Recompute blocks in backward: torch's non-reentrant checkpoint, or fairscale's wrapper."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
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
            run = _offloading_checkpoint if config.offload else _torch_checkpoint
            block.forward = partial(run, block.forward)  # type: ignore[method-assign]
        else:
            with warnings.catch_warnings():
                # fairscale 0.4.13 decorates with torch.cuda.amp names that torch has renamed.
                warnings.simplefilter("ignore", FutureWarning)
                from fairscale.nn.checkpoint import checkpoint_wrapper
            checkpoint_wrapper(block, offload_to_cpu=config.offload)


def _torch_checkpoint(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _offloading_checkpoint(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """What the checkpoint keeps are the block's inputs: these go to host memory, pinned where there is a GPU.

    Recomputing saves tensors outside of this context, so nothing else goes there.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _torch_checkpoint(forward, *args, **kwargs)
