"""The global order of samples: a pure function of (seed, epoch, shard sizes, position).

Nothing here knows ranks, workers or history, so the order is the same for any number of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from swinv2_scale.draws import key_of, permuted

_Blocks = tuple[list[tuple[list[int], list[int]]], list[int]]
#: Weights of a mixture are rounded to this many parts of the whole.
_MOST_PARTS = 10_000


class Place(NamedTuple):
    """Where the sample of a position lies."""

    source: int  # of a mixture; 0 where there is one data set
    epoch: int  # of that source
    shard: int  # over all sources, as the ShardSet counts them
    sample: int  # in the shard
    number: int  # in the source, in the order of its shards


class Epoch(NamedTuple):
    """One pass over one source of a mixture."""

    source: int
    number: int
    num_samples: int


@dataclass(frozen=True)
class SourceOrder:
    """Positions 0, 1, 2, ... of one data set over endless epochs; each epoch holds every sample exactly once.

    The shards are permuted and dealt into blocks of ``shuffle_shards``; inside a block all samples are permuted. A
    reader so touches few files at a time while neighbouring samples come from many.

    Args:
        sizes: samples of each shard.
        seed: another seed, another order.
        shuffle: False gives shard after shard, every epoch alike.
        shuffle_shards: shards of one block; at least the number of shards gives a full permutation.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool
    shuffle_shards: int

    _blocks_of: dict[int, _Blocks] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    @property
    def num_samples(self) -> int:
        return self.ends[-1]

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, sample); the same work for any position: nothing before it is looked at, but an epoch's
        shards are permuted once.
        """
        epoch, offset = divmod(position, self.num_samples)
        if not self.shuffle:
            return epoch, *_piece(self.ends, offset)
        blocks, ends = self._blocks(epoch)
        block, offset = _piece(ends, offset)
        shards, shard_ends = blocks[block]
        offset = permuted(offset, shard_ends[-1], key_of(self.seed, epoch, "samples", block))
        which, offset = _piece(shard_ends, offset)
        return epoch, shards[which], offset

    def _blocks(self, epoch: int) -> _Blocks:
        """(shards, their cumulative sizes) of each block, and the cumulative sizes of the blocks."""
        if epoch not in self._blocks_of:
            key = key_of(self.seed, epoch, "shards")
            shards = [permuted(i, len(self.sizes), key) for i in range(len(self.sizes))]
            dealt = [shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)]
            blocks = [(block, list(accumulate(self.sizes[shard] for shard in block))) for block in dealt]
            for old in [e for e in self._blocks_of if abs(e - epoch) > 1]:
                del self._blocks_of[old]
            self._blocks_of[epoch] = blocks, list(accumulate(ends[-1] for _, ends in blocks))
        return self._blocks_of[epoch]


@dataclass(frozen=True)
class Order:
    """Positions 0, 1, 2, ... of a weighted mixture of data sets, of which most often there is one.

    Positions are dealt in cycles of ``sum(parts)``: in each, source ``k`` gets ``parts[k]`` of them, at places that are
    permuted anew, so every source keeps its share in any stretch of the training and its own exact epochs.

    Args:
        sources: the order of each data set.
        parts: how many positions of a cycle each source gets.
    """

    sources: tuple[SourceOrder, ...]
    parts: tuple[int, ...]
    seed: int

    @classmethod
    def of(
        cls,
        sizes: tuple[int, ...],
        seed: int,
        shuffle: bool,
        shuffle_shards: int,
        source_shards: tuple[int, ...] = (),
        weights: tuple[float, ...] | None = None,
    ) -> Order:
        """The order over the shards of a ShardSet.

        Args:
            sizes: samples of each shard.
            source_shards: how many of the shards each source has; by default they are one source.
            weights: one for each source, of any sum; None where there is one.
        """
        orders, start = [], 0
        for number, count in enumerate(source_shards or (len(sizes),)):
            # Sources that are as large as each other must not run in parallel.
            source_seed = seed if number == 0 else key_of(seed, "source", number)
            orders.append(SourceOrder(sizes[start : start + count], source_seed, shuffle, shuffle_shards))
            start += count
        return cls(tuple(orders), parts_of(weights or (1.0,) * len(orders)), seed)

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)

    @cached_property
    def _part_ends(self) -> list[int]:
        return list(accumulate(self.parts))

    @cached_property
    def _first_shards(self) -> list[int]:
        return [0, *accumulate(len(source.sizes) for source in self.sources)]

    def locate(self, position: int) -> Place:
        """Where the sample of a position lies; looks at nothing before it."""
        if len(self.sources) == 1:
            return self._place(0, *self.sources[0].locate(position))
        cycle, slot = divmod(position, self._part_ends[-1])
        slot = permuted(slot, self._part_ends[-1], key_of(self.seed, "mixture", cycle))
        source, slot = _piece(self._part_ends, slot)
        return self._place(source, *self.sources[source].locate(cycle * self.parts[source] + slot))

    def substitute(self, position: int, attempt: int) -> Place:
        """The sample that stands in for a damaged one: of the same source and epoch, whoever asks."""
        lost = self.locate(position)
        ends = self.sources[lost.source].ends
        index = key_of(self.seed, "substitute", position, attempt) % ends[-1]
        return self._place(lost.source, lost.epoch, *_piece(ends, index))

    def epochs(self, first: int, end: int) -> list[Epoch]:
        """The epochs of which positions ``first .. end-1`` can hold samples."""
        found = []
        for number, (source, part) in enumerate(zip(self.sources, self.parts, strict=True)):
            low, high = (first // self._cycle) * part, -(-end // self._cycle) * part - 1
            for epoch in range(low // source.num_samples, high // source.num_samples + 1):
                found.append(Epoch(number, epoch, source.num_samples))
        return found

    def is_over(self, epoch: Epoch, position: int) -> bool:
        """Whether all of an epoch lies before a position."""
        return (position // self._cycle) * self.parts[epoch.source] >= (epoch.number + 1) * epoch.num_samples

    @property
    def _cycle(self) -> int:
        return self._part_ends[-1]

    def _place(self, source: int, epoch: int, shard: int, sample: int) -> Place:
        start = self.sources[source].ends[shard - 1] if shard else 0
        return Place(source, epoch, self._first_shards[source] + shard, sample, start + sample)


def parts_of(weights: Iterable[float]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportions, to a ten-thousandth of their sum, none below one."""
    weights = tuple(weights)
    shares = (Fraction(weight / sum(weights)).limit_denominator(_MOST_PARTS) for weight in weights)
    exact = [share or Fraction(1, _MOST_PARTS) for share in shares]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*parts)
    parts = [part // divisor for part in parts]
    if sum(parts) > _MOST_PARTS:
        parts = [max(round(_MOST_PARTS * part / sum(parts)), 1) for part in parts]
    return tuple(parts)


def _piece(ends: list[int], offset: int) -> tuple[int, int]:
    """Which piece of a row of pieces an offset falls into, and where in it."""
    piece = bisect_right(ends, offset)
    return piece, offset - (ends[piece - 1] if piece else 0)


def positions_of(step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[range]:
    """The positions that a rank reads for one step, one range a micro-batch.

    Step s (counted from 0) consumes positions s*G .. (s+1)*G-1 whatever the number of ranks; each micro-step takes the
    next ``world_size`` micro-batches, one a rank.
    """
    first = step * global_batch_size
    stride = micro_batch_size * world_size
    starts = range(first + rank * micro_batch_size, first + global_batch_size, stride)
    return [range(start, start + micro_batch_size) for start in starts]
