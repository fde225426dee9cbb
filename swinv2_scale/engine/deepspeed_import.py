"""DeepSpeed, imported the one way it is used here; other modules of the engine take it from this one."""

from __future__ import annotations

import logging
import os

import torch
import torch.utils.checkpoint

# Detection works, but warns on every rank that no GPU was found.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# Otherwise DeepSpeed compiles a shared-memory transport on the first CPU run: minutes, and a C++ compiler.
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed 0.19.8 imports Muon whatever the optimizer, and Muon's decorators import torch's whole compiler: 1.7 s of
# every start. Nobody here uses Muon; imported once without the decorators it costs nothing.
_decorate, compiler.compile = compiler.compile, lambda: lambda function: function
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

compiler.compile = _decorate

# Python 3.11.0 to 3.11.3 (Debian 12's) pickle an enum as a call of getattr, which weights_only=True rightly refuses.
ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (ZeroStageEnum, (self.value,))

#: DeepSpeed's own logger writes to the console from every rank; its lines go to RUN/log/rank-N.log instead.
deepspeed_logger = logging.getLogger("DeepSpeed")
for _handler in list(deepspeed_logger.handlers):
    deepspeed_logger.removeHandler(_handler)
deepspeed_logger.propagate = False

#: Where it and torch say of functions that they are not to be compiled; see compilation.left_out().
_places = (torch.optim.Optimizer, torch.utils.checkpoint, coordinator, coordinator.PartitionedParameterCoordinator)
not_compiled = [checkpointing.checkpoint, *(found for place in _places for found in vars(place).values())]

#: Modules that take DeepSpeed's compiled file operator; engine/swap_files.py gives them another.
swappers = (partitioned_optimizer_swapper, partitioned_param_swapper)

__all__ = [
    "LossScaler",
    "TorchCheckpointEngine",
    "ZeroStageEnum",
    "deepspeed",
    "deepspeed_logger",
    "fragment_address",
    "not_compiled",
    "swappers",
]
