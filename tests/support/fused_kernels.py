"""The fused attention of each instruction set that this CPU has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swinv2_scale.models.ops import build, fused
from swinv2_scale.models.ops.attend import Attend
from swinv2_scale.models.tiles import Tiling

is_built = build.find() is not None
needs_fused = pytest.mark.skipif(not is_built, reason="fused is not built; swinv2-scale kernels build")

if is_built:
    fused.load()


def usable() -> list[str]:
    """What this CPU can run, the portable kernels first."""
    return list(torch.ops.swinv2_scale.usable_kernels()) if is_built else []


def fused_by(kernels: str) -> Attend:
    """``fused`` with the kernels of one instruction set."""

    def attend(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling) -> Tensor:
        torch.ops.swinv2_scale.select_kernels(kernels)
        return fused.fused(qkv, logit_scale, bias_table, tiles)

    return attend


#: By name, those that can't run here too: their tests are skipped, and say why.
BY_NAME = {f"fused {name}": fused_by(name) for name in fused.KERNELS}


def parameters(others: list[str]) -> list[object]:
    """Names of backends for pytest.mark.parametrize: others, and all of BY_NAME."""
    found = usable()
    reason = "fused is not built" if not is_built else "this CPU doesn't have it"
    marks = {name: () if name in found else (pytest.mark.skip(reason=reason),) for name in fused.KERNELS}
    return [*others, *(pytest.param(f"fused {name}", marks=marks[name]) for name in fused.KERNELS)]
