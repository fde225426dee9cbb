"""Every random number of a training: a hash of (seed, epoch, sample, purpose), never a generator with a state.

So no number depends on which rank or worker drew it, on what was drawn before, or on how often the job was stopped;
nothing has to be saved in a checkpoint, and recomputing a block draws the same numbers again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
# SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits whose outputs for 0, 1, 2, ... pass statistical tests.
_GAMMA, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*parts: int | str) -> int:
    """64 bits that depend on every part; parts of different types or lengths never collide by concatenation."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Names in foreign tars need not be UTF-8; Python carries such bytes as surrogates.
        text = str(part).encode("utf-8", "surrogateescape")
        digest.update(b"%b %d:" % (type(part).__name__.encode(), len(text)) + text)
    return int.from_bytes(digest.digest(), "little")


def mix(value: int) -> int:
    """SplitMix64's output for one 64-bit state."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_A) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_B) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample in one epoch.

    Args:
        seed: the run's seed.
        epoch: how often the data set has been seen; validation uses one fixed name instead.
        sample: the sample's id, unique in its data set.
        position: where in the endless order of the training the sample stands; for what it shares with neighbours.
    """

    seed: int
    epoch: int | str
    sample: str
    position: int = 0

    def key(self, purpose: str) -> int:
        return key_of(self.seed, self.epoch, self.sample, purpose)

    def generator(self, purpose: str) -> np.random.Generator:
        """A fresh numpy generator; Philox's stream is specified, the same on every platform."""
        return np.random.Generator(np.random.Philox(key=self.key(purpose)))

    def uniforms(self, purpose: str) -> Iterator[float]:
        """Endless numbers in [0, 1), multiples of 2**-53; for a few of them a tenth of a generator's time."""
        state = self.key(purpose)
        while True:
            yield (mix(state) >> 11) * 2.0**-53
            state = (state + _GAMMA) & _MASK

    def tensor_key(self, purpose: str) -> int:
        """The key as a signed 64-bit number, to ride with the batch."""
        key = self.key(purpose)
        return key - (1 << 64) if key >= 1 << 63 else key


def permuted(index: int, size: int, key: int) -> int:
    """Where ``index`` lands in a pseudo-random permutation of ``range(size)``, without making the permutation.

    An eight-round Feistel network on the smallest even number of bits that holds ``size``, walked until inside.
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_number in range(8):
            left, right = right, left ^ (mix(right ^ key ^ (round_number << 56)) & low)
        index = (left << half) | right
        if index < size:
            return index


def uniform(keys: Tensor, stream: int) -> Tensor:
    """One uniform number in [0, 1) per key, on the keys' device.

    Args:
        keys: int64 (B,), one per sample.
        stream: which of the sample's numbers, 0, 1, 2, ...

    Returns:
        float32 (B,), multiples of 2**-24.
    """
    state = keys + _signed((_GAMMA * (stream + 1)) & _MASK)
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX_A)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX_B)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def normal(keys: Tensor, count: int) -> Tensor:
    """``count`` numbers of a standard normal distribution per key, on the keys' device.

    Args:
        keys: int64 (B,), one per sample.

    Returns:
        float32 (B, count).
    Source: Box and Muller (1958).
    """
    pairs = torch.arange((count + 1) // 2, device=keys.device)
    own = keys[:, None] + pairs * _signed((2 * _GAMMA) & _MASK)
    radius = (-2 * torch.log1p(-uniform(own, 0))).sqrt()
    angle = 2 * math.pi * uniform(own, 1)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :count]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
