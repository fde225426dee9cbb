"""The global order of samples: a pure function of (seed, epoch, shard sizes, position).

Nothing here knows ranks, workers or history, so the order is the same for any number of them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from swinv2_scale.draws import key_of, permuted


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

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    def locate(self, position: int) -> Place:
        """Constant work, whatever the position; nothing before it is looked at."""
        epoch, offset = divmod(position, _ends(self.sizes)[-1])
        if not self.shuffle:
            shard = bisect_right(_ends(self.sizes), offset)
            return Place(epoch, shard, offset - (_ends(self.sizes)[shard - 1] if shard else 0))
        blocks, ends = _blocks(self.sizes, self.seed, epoch, self.shuffle_shards)
        block = bisect_right(ends, offset)
        offset -= ends[block - 1] if block else 0
        shards, shard_ends = blocks[block]
        offset = permuted(offset, shard_ends[-1], key_of(self.seed, epoch, "samples", block))
        which = bisect_right(shard_ends, offset)
        return Place(epoch, shards[which], offset - (shard_ends[which - 1] if which else 0))


@lru_cache(maxsize=8)
def _ends(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(sizes))


@lru_cache(maxsize=4)
def _blocks(
    sizes: tuple[int, ...], seed: int, epoch: int, shuffle_shards: int
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """For one epoch: (shards, their cumulative sizes) of each block, and the cumulative sizes of the blocks."""
    key = key_of(seed, epoch, "shards")
    shards = [permuted(i, len(sizes), key) for i in range(len(sizes))]
    dealt = [shards[i : i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
    blocks = [(block, list(accumulate(sizes[shard] for shard in block))) for block in dealt]
    return blocks, list(accumulate(ends[-1] for _, ends in blocks))


def positions_of(step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[range]:
    """The positions that a rank reads for one step, one range a micro-batch.

    Step s (counted from 0) consumes positions s*G .. (s+1)*G-1 whatever the number of ranks; each micro-step takes the
    next ``world_size`` micro-batches, one a rank.
    """
    first = step * global_batch_size
    stride = micro_batch_size * world_size
    starts = range(first + rank * micro_batch_size, first + global_batch_size, stride)
    return [range(start, start + micro_batch_size) for start in starts]
