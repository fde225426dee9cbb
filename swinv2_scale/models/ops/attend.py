"""The attention contract, and the choice of a backend.

Letters: B images, L tokens of one map (row-major), N heads, D head_dim, n tokens of a tile.

1. A backend owns gather, normalisation, scale, bias expansion, softmax and the table's gradient; the caller owns
   parameters, both projections, the MLP that makes the table, and drop path.
2. q and k are normalised in float32 (float64 for float64); logits, scale, bias, softmax and the gradients of scale and
   table stay in float32, autocast off. A zero vector normalises to zero and passes no gradient.
3. Same input, same bits, forward and backward: no float atomics.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from swinv2_scale.errors import ConfigError
from swinv2_scale.models.ops import build, fused, torch_attention
from swinv2_scale.models.tiles import Tiling
from swinv2_scale.telemetry.console import log


class Attend(Protocol):
    def __call__(self, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, tiles: Tiling) -> Tensor:
        """softmax(logit_scale * cos(q, k) + bias) v inside every tile: all between the qkv and the output projection.

        Args:
            qkv: (B, L, 3, N, D), compute type, map order, as the Linear left it.
            logit_scale: (N,) float32, the multiplier: exp(clamp(parameter, max=log 100)) is done by the caller.
            bias_table: (N, 2*w_0-1, 2*w_1-1, ..) float32, 16*sigmoid applied; [n, w-1+dy, w-1+dx], d = query - key.
            tiles: which tokens attend to each other.

        Returns:
            (B, L, N, D) in qkv's type, map order; differentiable in the first three arguments.
        """
        ...


def resolve(backend: str, max_score_bytes: int) -> Attend:
    """The function behind a backend's name; called once, in a constructor.

    Raises:
        KeyError: unknown name (the configuration has refused it before).
        ConfigError: ``fused`` or ``triton`` is asked for and not there.
    """
    if backend == "auto":
        backend = choose()
    if backend == "triton":
        return _triton()
    if backend == "fused":
        fused.load()
    backends: dict[str, Attend] = {
        "eager": torch_attention.eager,
        "sequential": partial(torch_attention.sequential, max_score_bytes=max_score_bytes),
        "sdpa": torch_attention.sdpa,
        "fused": fused.fused,
    }
    return backends[backend]


@cache
def choose() -> Literal["eager", "fused"]:
    """What ``auto`` means in this process: ``fused`` on a machine without GPUs where it is built, else ``eager``.

    Said once in the log.
    """
    if torch.cuda.is_available():
        log().info("attention: auto takes eager on GPUs")
        return "eager"
    if build.find() is None:
        log().info("attention: auto takes eager: fused is not built (swinv2-scale kernels build)")
        return "eager"
    try:
        name = fused.load()
    except ConfigError as error:
        log().warning("attention: auto takes eager: %s", error.message)
        return "eager"
    log().info("attention: auto takes fused (%s)", name)
    return "fused"


def _triton() -> Attend:
    """Imported here: torch comes without Triton for CPUs and beyond Linux."""
    try:
        from swinv2_scale.models.ops import triton_attention
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        message = "attention backend triton: Triton isn't installed here (torch for GPUs brings it, on Linux)"
        raise ConfigError(
            message, "install torch for your GPU, or set model.attention.backend to another one"
        ) from error
    return triton_attention.attend
