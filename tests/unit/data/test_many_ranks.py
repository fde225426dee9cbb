"""The order of samples for more ranks than this machine could start: it knows no ranks, so they cost nothing."""

import pytest

from swinv2_scale.data.loader import sample_digest
from swinv2_scale.data.order import Order, positions_of

GLOBAL_BATCH, MICRO_BATCH, STEP = 64_000, 16, 7
FIRST = STEP * GLOBAL_BATCH


@pytest.fixture(scope="module")
def digests() -> dict[int, int]:
    """What each position of the step adds to its digest."""
    order = Order.of((1281,) * 500, seed=3, shuffle=True, shuffle_shards=64)
    places = ((p, order.locate(p)) for p in range(FIRST, FIRST + GLOBAL_BATCH))
    return {position: sample_digest(position, f"{place.shard}/{place.sample}") for position, place in places}


@pytest.mark.parametrize("world_size", [1, 500, 1000, 4000])
def test_a_global_batch_is_dealt_exactly_once_and_has_the_digest_of_one_rank(
    world_size: int, digests: dict[int, int]
) -> None:
    shares = [positions_of(STEP, GLOBAL_BATCH, MICRO_BATCH, rank, world_size) for rank in range(world_size)]
    dealt = [position for share in shares for part in share for position in part]
    assert sorted(dealt) == list(range(FIRST, FIRST + GLOBAL_BATCH))
    assert {sum(map(len, share)) for share in shares} == {GLOBAL_BATCH // world_size}, "every rank has as many"
    ours = [sum(digests[position] for part in share for position in part) for share in shares]
    assert sum(ours) == sum(digests.values())
