"""Whatever happens to a run - kills, other numbers of ranks, workers, batches ahead - it sees the same global batches.

Lives of a run are played with the real shards, reader and loader of every rank; what is compared is the order of the
samples and their random numbers, not a sorted set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swinv2_scale.data.ledger import EpochAccount, Ledger
from swinv2_scale.data.loader import PositionDataset, Sample, Share, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.manifest import INDEX_ENTRY
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from swinv2_scale.draws import Draw

torch.set_num_threads(1)

GLOBAL_BATCH, NUM_STEPS = 12, 7
#: (processes, samples of one at once) into which a global batch of 12 can be cut.
SPLITS = [(1, 12), (1, 4), (2, 6), (2, 3), (2, 1), (3, 4), (3, 2), (4, 3), (4, 1), (6, 2), (12, 1)]
DAMAGED = {(1, 2), (3, 0), (6, 4)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """47 photographs in seven shards of two data sets, three of them damaged."""
    folder = tmp_path_factory.mktemp("histories")
    photographs = fashion_mnist("validation")
    for name, count, size in (("a", 26, 7), ("b", 21, 8)):
        write_shards(islice(photographs, count), folder / name, samples_per_shard=size, made_by="a test")
    found = ShardSet.joined([read_shard_set(f"{folder}/{name}/*.tar") for name in ("a", "b")])
    for shard, sample in DAMAGED:
        index = Path(found.index_locations[shard]).read_bytes()
        offset, length, _ = INDEX_ENTRY.unpack_from(index, sample * INDEX_ENTRY.size)
        tar = Path(found.locations[shard])
        data = bytearray(tar.read_bytes())
        data[offset + length // 2] ^= 1
        tar.write_bytes(data)
    return found


def make_sample(record: Record, draw: Draw) -> Sample:
    return {"number": np.asarray(int(record.key[-6:])), "random": np.asarray(draw.key("a test"), np.uint64)}


def dataset_of(shards: ShardSet) -> PositionDataset:
    order = Order.of(shards.sizes, 5, True, 2, shards.sources, (2.0, 1.0))
    return PositionDataset(ShardReader(shards), order, make_sample, skip_damaged=True)


@dataclass(frozen=True)
class Life:
    """One start of a run: how it was cut, and after how many steps it ended, of which how many weren't saved."""

    split: tuple[int, int]
    num_workers: int
    prefetch_batches: int
    steps: int
    lost_steps: int


#: A position's sample, its random number, and whether it stands in for another.
Seen = tuple[int, int, bool]


def play(shards: ShardSet, life: Life, first: int, ledger: Ledger) -> tuple[list[list[Seen]], list[Ledger]]:
    """The global batches of a life, and the ledger after each of them, as rank 0 would save it."""
    world_size, micro_batch_size = life.split
    datasets = [dataset_of(shards) for _ in range(world_size)]
    order = datasets[0].order
    ranks = [
        training_batches(
            datasets[rank],
            Share(GLOBAL_BATCH, micro_batch_size, rank, world_size, life.num_workers, life.prefetch_batches, 2**20, 64),
            first,
            NUM_STEPS,
        )
        for rank in range(world_size)
    ]
    batches, ledgers = [], []
    for step in range(first, min(first + life.steps, NUM_STEPS)):
        seen: list[Seen] = []
        counts = torch.zeros(0)
        for _ in range(GLOBAL_BATCH // (world_size * micro_batch_size)):
            for rank in ranks:
                batch = next(rank)
                counts = counts + batch.tally if len(counts) else batch.tally
                lost = {q.position for q in batch.quarantined}
                start = step * GLOBAL_BATCH + len(seen)
                rows = zip(batch.arrays["number"].tolist(), batch.arrays["random"].tolist(), strict=True)
                seen += [(n, r, start + i in lost) for i, (n, r) in enumerate(rows)]
        begin = step * GLOBAL_BATCH
        ledger = ledger.with_step(order.epochs(begin, begin + GLOBAL_BATCH), counts.tolist())
        ledger, _ = ledger.closed(order, begin + GLOBAL_BATCH)  # asserts what is over
        batches.append(seen)
        ledgers.append(ledger)
    for rank in ranks:
        rank.close()
    return batches, ledgers


@pytest.fixture(scope="module")
def unbroken(shards: ShardSet) -> tuple[list[list[Seen]], Ledger]:
    batches, ledgers = play(shards, Life((1, 12), 0, 1, NUM_STEPS, 0), 0, Ledger())
    return batches, ledgers[-1]


LIVES = st.builds(
    Life,
    split=st.sampled_from(SPLITS),
    # Worker processes take 100 times as long to start as all the rest; one life in fifty has them.
    num_workers=st.sampled_from([0] * 49 + [2]),
    prefetch_batches=st.integers(1, 4),
    steps=st.integers(1, NUM_STEPS),
    lost_steps=st.integers(0, 3),
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LIVES, min_size=1, max_size=3))
def test_f09_any_history_gives_the_global_batches_of_an_unbroken_run(
    shards: ShardSet, unbroken: tuple[list[list[Seen]], Ledger], lives: list[Life]
) -> None:
    wanted, last_ledger = unbroken
    saved, saved_ledger = 0, Ledger()
    rest = Life((1, 12), 0, 1, NUM_STEPS, 0)
    for life in [*lives, rest]:
        batches, ledgers = play(shards, life, saved, saved_ledger)
        assert batches == wanted[saved : saved + len(batches)]
        kept = max(len(batches) - life.lost_steps, 0)
        if kept:
            # As a checkpoint would carry it.
            saved, saved_ledger = (
                saved + kept,
                Ledger(tuple(EpochAccount(**vars(a)) for a in ledgers[kept - 1].accounts)),
            )
    assert saved == NUM_STEPS
    assert saved_ledger == last_ledger


def test_f09_the_unbroken_run_is_what_the_order_says(
    shards: ShardSet, unbroken: tuple[list[list[Seen]], Ledger]
) -> None:
    """Against the order alone, without a loader: places, who stands in for whom, and the random numbers."""
    dataset = dataset_of(shards)
    for position, (number, random, stands_in) in enumerate(seen for batch in unbroken[0] for seen in batch):
        place = dataset.order.locate(position)
        assert stands_in == ((place.shard, place.sample) in DAMAGED)
        attempt, found = 0, place
        while (found.shard, found.sample) in DAMAGED:
            found = dataset.order.substitute(position, attempt)
            attempt += 1
        record = dataset.reader.read(found.shard, found.sample)
        assert number == int(record.key[-6:])
        use = f" for {position}" if stands_in else ""
        assert random == Draw(5, place.epoch, record.id + use).key("a test")
    assert sum(stands_in for batch in unbroken[0] for _, _, stands_in in batch) >= 3
