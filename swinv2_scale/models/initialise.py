"""First values of parameters, a function of (seed, name, shape) alone.

So they are the same bits for any number of ranks, with and without ``zero.Init`` (which drops whatever a constructor or
``model.apply`` writes, without a word), and whatever else the model contains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swinv2_scale.draws import key_of
from swinv2_scale.models.block import INITIAL_LOGIT_SCALE, Block

#: Of truncated normal distributions.
INITIAL_STD = 0.02


def initial_values(model: nn.Module, shapes: dict[str, torch.Size], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 value) of every parameter, one at a time.

    Args:
        model: says which modules are what; its parameters may be partitioned, only ``shapes`` is believed.
        shapes: full shape of every parameter, by name.
    Source: the released code: linear layers trunc_normal(std=0.02) without bias, the gains of the res-post-norms zero
    (each block starts as the identity), all other norms one, patch convolution and decoder as torch does it.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        owner_name, _, leaf = name.rpartition(".")
        yield name, _initial_value(modules, owner_name, leaf, shape, key_of(seed, "init", name))


def _initial_value(modules: dict[str, nn.Module], owner_name: str, leaf: str, shape: torch.Size, key: int) -> Tensor:
    owner = modules[owner_name]
    generator = torch.Generator().manual_seed(key >> 1)
    value = torch.zeros(shape)
    if leaf == "logit_scale":
        return value.fill_(INITIAL_LOGIT_SCALE)
    if leaf == "mask_token":
        # Zeros, as Hugging Face has it, give a first gradient norm of 1e17 through the cosine attention.
        return nn.init.trunc_normal_(value, std=INITIAL_STD, generator=generator)
    if isinstance(owner, nn.LayerNorm):
        parent = modules[owner_name.rpartition(".")[0]] if "." in owner_name else None
        is_residual = isinstance(parent, Block) and owner is not parent.norm3
        return value.fill_(0.0 if leaf == "bias" or is_residual else 1.0)
    if isinstance(owner, nn.Linear):
        return value if leaf == "bias" else nn.init.trunc_normal_(value, std=INITIAL_STD, generator=generator)
    if isinstance(owner, nn.Conv2d):
        fan_in = owner.in_channels // owner.groups * owner.kernel_size[0] * owner.kernel_size[1]
        return value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    if leaf in ("q_bias", "v_bias"):
        return value
    raise AssertionError(f"no initial value is defined for {owner_name}.{leaf}")
