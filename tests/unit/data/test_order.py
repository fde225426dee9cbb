"""The order of samples, and who reads which of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.data.order import Order, Place, positions_of

#: Shard sizes, shards in a block.
LAYOUTS = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=20).map(tuple), st.integers(1, 25))


def epoch_places(order: Order, epoch: int) -> list[Place]:
    first = epoch * order.num_samples
    return [order.locate(position) for position in range(first, first + order.num_samples)]


def all_samples(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.integers(0, 2**31), st.integers(0, 10**6), st.booleans())
def test_every_epoch_holds_every_sample_exactly_once(
    layout: tuple[tuple[int, ...], int], seed: int, epoch: int, shuffle: bool
) -> None:
    sizes, shuffle_shards = layout
    order = Order(sizes, seed, shuffle, shuffle_shards)
    places = epoch_places(order, epoch)
    assert {place.epoch for place in places} == {epoch}
    assert sorted((place.shard, place.sample) for place in places) == all_samples(sizes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any).map(tuple), st.integers(1, 14), st.booleans())
def test_empty_shards_are_never_read(sizes: tuple[int, ...], shuffle_shards: int, shuffle: bool) -> None:
    places = epoch_places(Order(sizes, 0, shuffle, shuffle_shards), 0)
    assert sorted((place.shard, place.sample) for place in places) == all_samples(sizes)


def test_without_shuffling_shards_follow_each_other_in_every_epoch() -> None:
    order = Order((3, 1, 2), seed=5, shuffle=False, shuffle_shards=2)
    for epoch in (0, 7):
        assert [(place.shard, place.sample) for place in epoch_places(order, epoch)] == all_samples((3, 1, 2))


def test_epochs_and_seeds_give_different_orders() -> None:
    sizes = (40,) * 5
    orders = [
        [place[1:] for place in epoch_places(Order(sizes, seed, True, 5), epoch)]
        for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two random orders of 200 agree at one place on average; Poisson's chance of 10 or more is 1e-7.
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_samples_of_one_shard_are_not_left_in_their_order() -> None:
    (block,) = [[place.sample for place in epoch_places(Order((200,), 0, True, 1), 0)]]
    rising = sum(a < b for a, b in pairwise(block))
    # Half of 199 neighbours rise in a random order, with a standard deviation of 4.
    assert 80 < rising < 120
    assert sum(abs(a - b) == 1 for a, b in pairwise(block)) < 12  # 2 on average


@settings(max_examples=50, deadline=None)
@given(LAYOUTS, st.data())
def test_a_place_does_not_depend_on_what_was_asked_before(
    layout: tuple[tuple[int, ...], int], data: st.DataObject
) -> None:
    sizes, shuffle_shards = layout
    order = Order(sizes, 3, True, shuffle_shards)
    in_order = [order.locate(position) for position in range(3 * order.num_samples)]
    asked = data.draw(st.lists(st.integers(0, 3 * order.num_samples - 1), max_size=20))
    again = Order(sizes, 3, True, shuffle_shards)
    assert [again.locate(position) for position in asked] == [in_order[position] for position in asked]


def test_another_process_finds_the_same_places() -> None:
    code = (
        "from swinv2_scale.data.order import Order;"
        "print([tuple(Order((7, 5, 9, 4), 3, True, 2).locate(p)) for p in range(60)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    order = Order((7, 5, 9, 4), 3, True, 2)
    assert printed.strip() == str([tuple(order.locate(position)) for position in range(60)])


def test_neighbours_come_from_many_shards_and_reading_stays_inside_a_block() -> None:
    order = Order((100,) * 64, seed=1, shuffle=True, shuffle_shards=16)
    for epoch in (0, 1):
        places = epoch_places(order, epoch)
        for first in range(0, 6400, 1600):
            block = places[first : first + 1600]
            assert len({place.shard for place in block}) == 16
            for start in range(0, 1600, 64):
                # 64 of 1600 miss a given shard with probability (15/16)^64 = 1.6 %: 16 less a quarter on average.
                assert len({place.shard for place in block[start : start + 64]}) >= 12


def test_blocks_are_dealt_anew_in_every_epoch() -> None:
    order = Order((10,) * 64, seed=1, shuffle=True, shuffle_shards=16)
    first_blocks = [frozenset(place.shard for place in epoch_places(order, epoch)[:160]) for epoch in range(5)]
    assert len(set(first_blocks)) == 5


def test_far_positions_are_found_as_easily_as_near_ones() -> None:
    order = Order((1000,) * 1000, seed=0, shuffle=True, shuffle_shards=64)
    place = order.locate(10**15 + 7)
    assert place.epoch == 10**9
    assert 0 <= place.shard < 1000
    assert 0 <= place.sample < 1000


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 1000),
    world_size=st.integers(1, 8),
    micro_batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 5),
)
def test_a_step_takes_each_of_its_positions_once_in_order_whatever_the_split(
    step: int, world_size: int, micro_batch_size: int, accumulation: int
) -> None:
    global_batch_size = world_size * micro_batch_size * accumulation
    ranks = [positions_of(step, global_batch_size, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert all(len(batches) == accumulation for batches in ranks)
    assert all(len(batch) == micro_batch_size for batches in ranks for batch in batches)
    # Micro-step after micro-step, in each of them rank after rank: the global order.
    joined = [position for micro_step in zip(*ranks, strict=True) for batch in micro_step for position in batch]
    assert joined == list(range(step * global_batch_size, (step + 1) * global_batch_size))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 24), (2, 12), (2, 3), (4, 6), (8, 1), (24, 1)])
def test_consecutive_steps_leave_nothing_out(world_size: int, micro_batch_size: int) -> None:
    seen = [
        position
        for step in range(5)
        for rank in range(world_size)
        for batch in positions_of(step, 24, micro_batch_size, rank, world_size)
        for position in batch
    ]
    assert sorted(seen) == list(range(5 * 24))
