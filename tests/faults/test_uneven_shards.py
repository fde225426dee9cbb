"""F10: shards of any sizes, fewer of them than readers: all ranks get as many batches, of the samples that are due.

With two real processes it is test_resume.py's (test_f10_..); that any history of kills and splits gives the same global
batches is test_histories.py's (test_f09_..).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_scale.data.loader import PositionDataset, Sample, Share, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.draws import Draw
from tests.support.deadline import within

torch.set_num_threads(1)
DEADLINE_S = 60
GLOBAL_BATCH, NUM_STEPS = 12, 6
RANDOM = np.random.default_rng(10)
#: Worker processes take a hundred times as long to start as all the rest: few cases have them.
CASES = [
    pytest.param([50], 4, 3, id="one shard for 4 ranks of 3 workers"),
    pytest.param([1, 1, 1], 2, 2, id="three samples for a batch of 12 by 2 ranks of 2 workers"),
    *(
        pytest.param(RANDOM.integers(1, 51, RANDOM.integers(1, 8)).tolist(), int(ranks), 0, id=f"drawn {number}")
        for number, ranks in enumerate(np.tile([1, 2, 3, 4], 5))
    ),
]


def make_sample(record: Record, draw: Draw) -> Sample:
    return {"number": np.asarray(int(record.files["cls"]))}


@pytest.mark.parametrize(("sizes", "num_ranks", "num_workers"), CASES)
def test_f10_ranks_stay_in_step_and_read_each_sample_when_it_is_due(
    tmp_path: Path, sizes: list[int], num_ranks: int, num_workers: int
) -> None:
    first = 0
    for shard, size in enumerate(sizes):
        samples = ({"__key__": f"{first + i}", "cls": str(first + i)} for i in range(size))
        write_shards(samples, tmp_path / f"{shard}", samples_per_shard=size, made_by="a test")
        first += size
    shards = read_shard_set(f"{tmp_path}/*/*.tar")
    order = Order.of(shards.sizes, 3, True, 2)
    micro_batch = GLOBAL_BATCH // num_ranks
    ranks = []
    with within(DEADLINE_S):
        for rank in range(num_ranks):
            dataset = PositionDataset(ShardReader(shards), order, make_sample, False)
            share = Share(GLOBAL_BATCH, micro_batch, rank, num_ranks, num_workers, 2, 2**20, 64)
            ranks.append([batch.arrays["number"].tolist() for batch in training_batches(dataset, share, 0, NUM_STEPS)])
    assert [len(batches) for batches in ranks] == [NUM_STEPS] * num_ranks
    seen = [number for step in zip(*ranks, strict=True) for batch in step for number in batch]
    starts = np.cumsum([0, *sizes])
    places = [order.locate(position) for position in range(GLOBAL_BATCH * NUM_STEPS)]
    assert seen == [starts[place.shard] + place.sample for place in places]
    for epoch in range(len(seen) // first):
        assert sorted(seen[epoch * first : (epoch + 1) * first]) == list(range(first))
