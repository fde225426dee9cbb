"""The global order of samples: a pure function of (seed, epoch, shard sizes, position).

Nothing here knows ranks, workers or history, so the order is the same for any number of them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from swinv2_scale.draws import key_of, permuted

_Blocks = tuple[list[tuple[list[int], list[int]]], list[int]]


class Place(NamedTuple):
    """Where the sample of a position lies."""

    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class Order:
    """Positions 0, 1, 2, ... over endless epochs; each epoch holds every sample exactly once.

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
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    @property
    def num_samples(self) -> int:
        return self._ends[-1]

    def locate(self, position: int) -> Place:
        """The same work for any position; nothing before it is looked at, but an epoch's shards are permuted once."""
        epoch, offset = divmod(position, self.num_samples)
        if not self.shuffle:
            shard, offset = _piece(self._ends, offset)
            return Place(epoch, shard, offset)
        blocks, ends = self._blocks(epoch)
        block, offset = _piece(ends, offset)
        shards, shard_ends = blocks[block]
        offset = permuted(offset, shard_ends[-1], key_of(self.seed, epoch, "samples", block))
        which, offset = _piece(shard_ends, offset)
        return Place(epoch, shards[which], offset)

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
