"""The order of samples, and who reads which of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.data.order import Order, Place, parts_of, positions_of

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
    order = Order.of(sizes, seed, shuffle, shuffle_shards)
    places = epoch_places(order, epoch)
    assert {place.epoch for place in places} == {epoch}
    assert sorted((place.shard, place.sample) for place in places) == all_samples(sizes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any).map(tuple), st.integers(1, 14), st.booleans())
def test_empty_shards_are_never_read(sizes: tuple[int, ...], shuffle_shards: int, shuffle: bool) -> None:
    places = epoch_places(Order.of(sizes, 0, shuffle, shuffle_shards), 0)
    assert sorted((place.shard, place.sample) for place in places) == all_samples(sizes)


def test_without_shuffling_shards_follow_each_other_in_every_epoch() -> None:
    order = Order.of((3, 1, 2), seed=5, shuffle=False, shuffle_shards=2)
    for epoch in (0, 7):
        assert [(place.shard, place.sample) for place in epoch_places(order, epoch)] == all_samples((3, 1, 2))


def test_epochs_and_seeds_give_different_orders() -> None:
    sizes = (40,) * 5
    orders = [
        [(place.shard, place.sample) for place in epoch_places(Order.of(sizes, seed, True, 5), epoch)]
        for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two random orders of 200 agree at one place on average; Poisson's chance of 10 or more is 1e-7.
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_samples_of_one_shard_are_not_left_in_their_order() -> None:
    (block,) = [[place.sample for place in epoch_places(Order.of((200,), 0, True, 1), 0)]]
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
    order = Order.of(sizes, 3, True, shuffle_shards)
    in_order = [order.locate(position) for position in range(3 * order.num_samples)]
    asked = data.draw(st.lists(st.integers(0, 3 * order.num_samples - 1), max_size=20))
    again = Order.of(sizes, 3, True, shuffle_shards)
    assert [again.locate(position) for position in asked] == [in_order[position] for position in asked]


def test_another_process_finds_the_same_places() -> None:
    code = (
        "from swinv2_scale.data.order import Order;"
        "print([tuple(Order.of((7, 5, 9, 4), 3, True, 2).locate(p)) for p in range(60)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    order = Order.of((7, 5, 9, 4), 3, True, 2)
    assert printed.strip() == str([tuple(order.locate(position)) for position in range(60)])


def test_neighbours_come_from_many_shards_and_reading_stays_inside_a_block() -> None:
    order = Order.of((100,) * 64, seed=1, shuffle=True, shuffle_shards=16)
    for epoch in (0, 1):
        places = epoch_places(order, epoch)
        for first in range(0, 6400, 1600):
            block = places[first : first + 1600]
            assert len({place.shard for place in block}) == 16
            for start in range(0, 1600, 64):
                # 64 of 1600 miss a given shard with probability (15/16)^64 = 1.6 %: 16 less a quarter on average.
                assert len({place.shard for place in block[start : start + 64]}) >= 12


def test_blocks_are_dealt_anew_in_every_epoch() -> None:
    order = Order.of((10,) * 64, seed=1, shuffle=True, shuffle_shards=16)
    first_blocks = [frozenset(place.shard for place in epoch_places(order, epoch)[:160]) for epoch in range(5)]
    assert len(set(first_blocks)) == 5


def test_far_positions_are_found_as_easily_as_near_ones() -> None:
    order = Order.of((1000,) * 1000, seed=0, shuffle=True, shuffle_shards=64)
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


SOURCES = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9).map(float)), min_size=2, max_size=4
)


def mixture(sources: list[tuple[list[int], float]], seed: int = 0) -> Order:
    sizes = tuple(size for shards, _ in sources for size in shards)
    counts = tuple(len(shards) for shards, _ in sources)
    return Order.of(sizes, seed, True, 3, counts, tuple(weight for _, weight in sources))


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.integers(0, 2**31))
def test_each_source_of_a_mixture_has_exact_epochs_of_its_own(
    sources: list[tuple[list[int], float]], seed: int
) -> None:
    order = mixture(sources, seed)
    cycle = sum(order.parts)
    rounds = -(-2 * max(source.num_samples for source in order.sources) // min(order.parts))
    end = min(rounds, max(3000 // cycle, 1)) * cycle
    read: dict[tuple[int, int], list[int]] = {}
    for position in range(end):
        place = order.locate(position)
        read.setdefault((place.source, place.epoch), []).append(place.number)
    for (source, epoch), indexes in read.items():
        size = order.sources[source].num_samples
        assert len(set(indexes)) == len(indexes)
        if (end // cycle) * order.parts[source] >= (epoch + 1) * size:
            assert sorted(indexes) == list(range(size))
    # In whole cycles every source has exactly its share.
    counts = [sum(len(found) for (source, _), found in read.items() if source == s) for s in range(len(sources))]
    assert counts == [end // cycle * part for part in order.parts]


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.integers(0, 500), st.integers(1, 60))
def test_the_epochs_that_are_said_to_touch_a_range_hold_all_its_places(
    sources: list[tuple[list[int], float]], first: int, length: int
) -> None:
    order = mixture(sources)
    epochs = order.epochs(first, first + length)
    known = {(epoch.source, epoch.number): epoch for epoch in epochs}
    assert len(known) == len(epochs)
    for position in range(first, first + length):
        place = order.locate(position)
        epoch = known[place.source, place.epoch]
        assert epoch.num_samples == order.sources[place.source].num_samples
        assert not order.is_over(epoch, position)


def test_a_place_in_a_mixture_names_shards_over_all_sources_and_samples_within_theirs() -> None:
    order = Order.of((4, 2, 5, 3), 0, True, 8, (2, 2), (1.0, 3.0))
    for position in range(200):
        place = order.locate(position)
        starts = {0: (0, 4), 1: (0, 5)}[place.source]
        assert place.shard // 2 == place.source
        assert place.number == starts[place.shard % 2] + place.sample


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((1, 2), (1, 2)),
        ((2, 4, 6), (1, 2, 3)),
        ((0.7, 0.3), (7, 3)),
        ((0.25, 0.25, 0.5), (1, 1, 2)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((1e-9, 1.0), (1, 9_999)),
        ((1e-5, 2e-5), (1, 2)),
        ((0.00015, 0.00005), (3, 1)),
        ((1.0,), (1,)),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights: tuple[float, ...], parts: tuple[int, ...]) -> None:
    assert parts_of(weights) == parts


def test_awkward_weights_are_kept_to_a_ten_thousandth() -> None:
    weights = (0.1234567, 0.3141592, 0.2718281, 0.290556)
    parts = parts_of(weights)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part / sum(parts) - weight) < 1.01e-4


def test_a_substitute_is_of_the_same_source_and_epoch_and_another_one_at_each_attempt() -> None:
    order = Order.of((40, 30, 50), 0, True, 8, (2, 1), (1.0, 1.0))
    for position in range(0, 600, 7):
        lost = order.locate(position)
        others = [order.substitute(position, attempt) for attempt in range(6)]
        assert {(other.source, other.epoch) for other in others} == {(lost.source, lost.epoch)}
        assert len({other.number for other in others}) > 3
        assert others == [order.substitute(position, attempt) for attempt in range(6)]
