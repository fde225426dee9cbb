"""torch.compile of a model's blocks: what lies between matrix products and attention becomes a few kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine.deepspeed_import import not_compiled
from swinv2_scale.errors import ConfigError
from swinv2_scale.models.block import Block

#: Shapes, types and drop path differ from stage to stage, gradients between training and validation: each combination
#: is compiled once. torch goes on uncompiled, with a warning, after 8.
_MOST_VARIANTS = 256


def check(config: RunConfig) -> None:
    """Whether this process can compile, before a training finds out.

    Raises:
        ConfigError: there is no compiler of C++ (for GPUs, Triton compiles its launchers with it).
    """
    compiler = os.environ.get("CXX", "g++")
    if config.model.compile and shutil.which(compiler) is None:
        raise ConfigError(
            f"model.compile is true: torch.compile needs a C++ compiler, there is no {compiler} in PATH",
            "install it (apt-get install g++), name another one in CXX, or set model.compile to false",
        )


@contextmanager
def left_out(config: RunConfig) -> Iterator[None]:
    """Around the building of an engine: torch's compiler isn't imported where nothing is compiled.

    torch and DeepSpeed say of some functions that they are not to be compiled, and import all of the compiler to say
    so when one is first called: 2 s of the processor in every rank.
    """
    if config.model.compile:
        yield
        return
    for function in not_compiled:
        undecorated = getattr(function, "__wrapped__", None)
        if isinstance(undecorated, FunctionType):  # torch/_compile.py keeps what it made of a function there
            undecorated.__dynamo_disable = undecorated  # type: ignore[attr-defined]
    disable = torch.compiler.disable
    torch.compiler.disable = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable


def _as_it_is(function: Any = None, **_: object) -> Any:
    """torch.compiler.disable, with or without arguments."""
    return _as_it_is if function is None else function


def apply(model: nn.Module, config: RunConfig) -> None:
    """Compile both halves of every Swin block, in place; parameter names stay as they are.

    Halves, not whole blocks: what a block does by its number (drop path) and by its map (tiles, bias table) stays
    outside, so that blocks of one stage share code. Compiling happens when a shape is first met.
    """
    if not config.model.compile:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attend = torch.compile(block.attend, dynamic=False)  # type: ignore[method-assign]
        block.feed_forward = torch.compile(block.feed_forward, dynamic=False)  # type: ignore[method-assign]
