"""Batches: the same samples for any rank count, worker count and starting step."""

from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.data.loader import (
    Batch,
    MakeSample,
    PositionDataset,
    Sample,
    Share,
    evaluation_batches,
    sample_digest,
    training_batches,
)
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.manifest import INDEX_ENTRY
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from swinv2_scale.draws import Draw
from swinv2_scale.errors import ConfigError, DataError, OutputError, SampleError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """40 photographs in five shards."""
    return photographs(tmp_path_factory.mktemp("photographs") / "s")


def photographs(folder: Path) -> ShardSet:
    write_shards(islice(fashion_mnist("validation"), 40), folder, samples_per_shard=8, made_by="a test")
    return read_shard_set(str(folder / "*.tar"))


def make_sample(record: Record, draw: Draw) -> Sample:
    """Pixels, a random number, and the photograph's number, which its key ends in."""
    with Image.open(io.BytesIO(record.files["png"])) as image:
        pixels = np.asarray(image)
    return {
        "pixels": pixels,
        "random": np.asarray(draw.generator("a test").random()),
        "number": np.asarray(int(record.id[-6:])),
    }


def order_of(shards: ShardSet, shuffle: bool = True) -> Order:
    return Order.of(shards.sizes, seed=3, shuffle=shuffle, shuffle_shards=3)


def dataset_of(
    shards: ShardSet,
    make: MakeSample = make_sample,
    *,
    shuffle: bool = True,
    skip: bool = False,
    epoch: str | None = None,
) -> PositionDataset:
    return PositionDataset(ShardReader(shards), order_of(shards, shuffle), make, skip, epoch)


def share_of(**options: int) -> Share:
    wanted = {
        "global_batch_size": 12,
        "micro_batch_size": 6,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
        "prefetch_batches": 2,
        "prefetch_bytes": 2**30,
        "sample_bytes": 28 * 28 + 16,
        **options,
    }
    return Share(**wanted)


def train(shards: ShardSet, **options: int) -> list[Batch]:
    """Batches of steps 0 to 5 in one process unless told otherwise: six steps of 12, almost two epochs of 40."""
    start, end = options.pop("start_step", 0), options.pop("end_step", 6)
    return list(training_batches(dataset_of(shards), share_of(**options), start, end))


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.digest == other.digest
        assert one.arrays.keys() == other.arrays.keys()
        for name in one.arrays:
            assert torch.equal(one.arrays[name], other.arrays[name]), name


def numbers(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.arrays["number"]]


def test_batches_hold_what_the_order_says(shards: ShardSet) -> None:
    batches = train(shards)
    assert [len(batch.arrays["number"]) for batch in batches] == [6] * 12
    order, reader = order_of(shards), ShardReader(shards)
    for position, number in enumerate(numbers(batches)):
        place = order.locate(position)
        record = reader.read(place.shard, place.sample)
        assert number == 8 * place.shard + place.sample
        row = batches[position // 6].arrays
        sample = make_sample(record, Draw(3, place.epoch, record.id))
        for name, value in sample.items():
            assert np.array_equal(row[name][position % 6].numpy(), value), name
    reader.close()


def test_an_epoch_gives_every_sample_once_and_other_random_numbers_next_time(shards: ShardSet) -> None:
    batches = train(shards, end_step=8, global_batch_size=10, micro_batch_size=10)
    first, second = batches[:4], batches[4:]
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(40))
    draws = [
        dict(zip(numbers(part), torch.cat([b.arrays["random"] for b in part]).tolist(), strict=True))
        for part in (first, second)
    ]
    assert all(draws[0][number] != draws[1][number] for number in range(40))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("start_step", [0, 4])
def test_workers_and_the_starting_step_change_nothing(shards: ShardSet, num_workers: int, start_step: int) -> None:
    wanted = train(shards)[2 * start_step :]  # two micro-batches a step
    assert_same(train(shards, start_step=start_step, num_workers=num_workers), wanted)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (2, 6), (2, 3), (4, 3), (4, 1)])
def test_f09_ranks_together_read_the_samples_of_one_process_in_its_order(
    shards: ShardSet, world_size: int, micro_batch_size: int
) -> None:
    options = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [train(shards, rank=rank, **options) for rank in range(world_size)]
    merged = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    wanted = train(shards)
    for name in ("pixels", "random", "number"):
        assert torch.equal(
            torch.cat([batch.arrays[name] for batch in merged]), torch.cat([batch.arrays[name] for batch in wanted])
        )
    # A step's digest is the sum over its batches, however they are cut.
    per_step = 12 // micro_batch_size
    digests = [sum(b.digest for b in merged[i : i + per_step]) for i in range(0, len(merged), per_step)]
    assert digests == [sum(b.digest for b in wanted[i : i + 2]) for i in range(0, len(wanted), 2)]


def test_a_digest_tells_samples_and_their_places_apart() -> None:
    digests = {sample_digest(position, f"s.tar/{key}") for position in range(50) for key in range(50)}
    assert len(digests) == 2500
    assert max(digests) < 2**48
    assert sample_digest(1, "a") + sample_digest(2, "b") != sample_digest(2, "a") + sample_digest(1, "b")


def damage(shards: ShardSet, shard: int, sample: int) -> None:
    """Flip a bit in the middle of a sample."""
    offset, length, _ = INDEX_ENTRY.unpack_from(
        Path(shards.index_locations[shard]).read_bytes(), sample * INDEX_ENTRY.size
    )
    path = Path(shards.locations[shard])
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_a_data_error_at_the_batch_that_needs_it(tmp_path: Path, num_workers: int) -> None:
    shards = photographs(tmp_path / "s")
    place = order_of(shards).locate(20)  # in the second step's second micro-batch
    damage(shards, place.shard, place.sample)
    batches = training_batches(dataset_of(shards), share_of(num_workers=num_workers), 0, 6)
    for _ in range(3):
        next(batches)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert f"{shards.locations[place.shard]}: sample {place.sample} " in caught.value.message
    assert caught.value.next_step
    assert "Traceback" not in str(caught.value)


def test_an_iterator_left_open_does_not_keep_the_process_from_ending(shards: ShardSet) -> None:
    script = (
        "import numpy, sys\n"
        "from swinv2_scale.data.loader import PositionDataset, Share, training_batches\n"
        "from swinv2_scale.data.shards.shard_set import read_shard_set\n"
        "from swinv2_scale.data.order import Order\n"
        "from swinv2_scale.data.shards.reader import ShardReader\n"
        "shards = read_shard_set(sys.argv[1])\n"
        "order = Order.of(shards.sizes, 0, True, 4)\n"
        "dataset = PositionDataset(ShardReader(shards), order, lambda record, draw: {'a': numpy.zeros(1)}, False)\n"
        "share = Share(1, 1, 0, 1, num_workers=1, prefetch_batches=1, prefetch_bytes=999, sample_bytes=8)\n"
        "next(training_batches(dataset, share, 0, 9))\n"
    )
    pattern = str(Path(shards.locations[0]).parent / "*.tar")
    ended = subprocess.run([sys.executable, "-c", script, pattern], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def refuse(record: Record, draw: Draw) -> Sample:
    raise DataError(f"{record.name} is refused", "do something else")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_the_task_refuses_is_the_tasks_error_word_for_word(shards: ShardSet, num_workers: int) -> None:
    batches = training_batches(dataset_of(shards, refuse), share_of(num_workers=num_workers), 0, 1)
    with pytest.raises(DataError, match=r"000\d\d\d\.tar: validation-\d+ is refused\n  next: do something else$"):
        next(batches)


def test_a_loader_leaves_torchs_generator_alone(shards: ShardSet) -> None:
    before = torch.get_rng_state()
    train(shards, end_step=1, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 5, 12, 37, 40])
def test_an_evaluation_weighs_each_sample_once_and_keeps_ranks_in_step(
    shards: ShardSet, num_samples: int, world_size: int
) -> None:
    dataset = dataset_of(shards, shuffle=False, epoch="evaluation")
    ranks = [
        list(evaluation_batches(dataset, share_of(micro_batch_size=4, rank=rank, world_size=world_size), num_samples))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch.arrays["number"]) == 4 for batches in ranks for batch in batches)
    weights = torch.cat([batch.arrays["weight"] for batches in ranks for batch in batches])
    assert weights.sum() == num_samples
    assert set(weights.tolist()) <= {0.0, 1.0}
    counted = [
        int(number)
        for batches in ranks
        for batch in batches
        for number, weight in zip(batch.arrays["number"], batch.arrays["weight"], strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(num_samples))


def test_an_evaluation_draws_the_same_numbers_every_time_and_for_any_rank(shards: ShardSet) -> None:
    def draws(world_size: int, micro_batch_size: int) -> dict[int, float]:
        found: dict[int, float] = {}
        for rank in range(world_size):
            share = share_of(micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
            for batch in evaluation_batches(dataset_of(shards, shuffle=False, epoch="evaluation"), share, 30):
                found.update(zip(batch.arrays["number"].tolist(), batch.arrays["random"].tolist(), strict=True))
        return found

    wanted = draws(1, 8)
    assert len(set(wanted.values())) == 30
    assert draws(1, 8) == draws(2, 4) == draws(3, 5) == wanted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_may_skip_replaces_a_damaged_sample_by_the_same_one_for_any_split(
    tmp_path: Path, num_workers: int
) -> None:
    shards = photographs(tmp_path / "s")
    lost = {2: {1, 5}, 4: {0}}
    for shard, samples in lost.items():
        for sample in samples:
            damage(shards, shard, sample)

    def read(world_size: int, micro_batch_size: int, workers: int) -> list[list[Batch]]:
        options = {"world_size": world_size, "micro_batch_size": micro_batch_size, "num_workers": workers}
        return [
            list(training_batches(dataset_of(shards, skip=True), share_of(rank=rank, **options), 0, 10))
            for rank in range(world_size)
        ]

    whole = read(1, 12, num_workers)
    split = read(2, 3, 0)
    merged = [batch for micro_step in zip(*split, strict=True) for batch in micro_step]
    for name in ("pixels", "random", "number"):
        assert torch.equal(
            torch.cat([batch.arrays[name] for batch in whole[0]]), torch.cat([batch.arrays[name] for batch in merged])
        )
    # 120 positions are three epochs of 40: each damaged sample is met three times, and no other.
    for batches in (whole[0], merged):
        listed = [q for batch in batches for q in batch.quarantined]
        names = [(Path(q.shard).name, q.sample, q.epoch) for q in listed]
        assert sorted(names) == sorted(
            (f"{shard:06d}.tar", sample, epoch) for shard in lost for sample in lost[shard] for epoch in range(3)
        )
        assert all("checksum" in q.cause for q in listed)
        tally = sum(batch.tally.sum(0) for batch in batches)
        assert tally[:2].tolist() == [120 - 9, 9]
    # Who stands in is itself whole, and drawn for with other numbers than as itself.
    damaged_numbers = {8 * shard + sample for shard in lost for sample in lost[shard]}
    assert not damaged_numbers & set(numbers(whole[0]))
    drawn = [float(value) for batch in whole[0] for value in batch.arrays["random"]]
    assert len(set(drawn)) == 120


def test_when_everything_is_damaged_the_run_stops_even_if_it_may_skip(shards: ShardSet) -> None:
    def refuse_all(record: Record, draw: Draw) -> Sample:
        raise SampleError("is refused")

    with pytest.raises(DataError, match="32 samples in a row are damaged, the last one: is refused"):
        next(training_batches(dataset_of(shards, refuse_all, skip=True), share_of(), 0, 1))


def test_a_damaged_sample_of_an_evaluation_has_no_weight_and_is_listed_once(tmp_path: Path) -> None:
    shards = photographs(tmp_path / "s")
    damage(shards, 1, 3)
    for world_size in (1, 3):
        listed, counted = [], []
        for rank in range(world_size):
            share = share_of(micro_batch_size=4, rank=rank, world_size=world_size)
            for batch in evaluation_batches(
                dataset_of(shards, shuffle=False, skip=True, epoch="evaluation"), share, 37
            ):
                listed += batch.quarantined
                weights = batch.arrays["weight"].tolist()
                counted += [n for n, weight in zip(batch.arrays["number"].tolist(), weights, strict=True) if weight]
        assert [(q.sample, q.position, q.epoch) for q in listed] == [(3, 11, "evaluation")]
        assert sorted(counted) == [number for number in range(37) if number != 11]


@pytest.mark.parametrize("rank", [0, 2])
def test_workers_give_an_evaluation_the_batches_that_it_has_without_them(shards: ShardSet, rank: int) -> None:
    def read(num_workers: int) -> list[Batch]:
        share = share_of(micro_batch_size=4, global_batch_size=12, rank=rank, world_size=3, num_workers=num_workers)
        return list(evaluation_batches(dataset_of(shards, shuffle=False, epoch="evaluation"), share, 37))

    assert len(read(0)) == 4
    assert_same(read(2), read(0))


def test_an_evaluations_errors_come_out_of_workers_and_its_workers_end_with_it(tmp_path: Path) -> None:
    shards = photographs(tmp_path / "s")
    damage(shards, 1, 3)
    before = {*multiprocessing.active_children()}
    dataset = dataset_of(shards, shuffle=False, epoch="evaluation")
    batches = evaluation_batches(dataset, share_of(micro_batch_size=4, num_workers=1), 37)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(SampleError, match=r"sample 3 .* is damaged"):
        next(batches)
    batches = evaluation_batches(dataset, share_of(micro_batch_size=4, num_workers=1), 37)
    next(batches)
    batches.close()
    assert {*multiprocessing.active_children()} <= before


@pytest.mark.parametrize(
    ("num_batches", "room", "num_workers", "expected"),
    [
        (9, 100, 4, (4, 2)),
        (3, 100, 4, (3, 1)),  # no worker without a batch
        (1, 100, 4, (0, 0)),
        (9, 100, 0, (0, 0)),
        # The training's four workers keep two each, which leaves room for two beside the one that is looked at.
        (9, 11, 4, (2, 1)),
        (9, 10, 4, (1, 1)),
        (9, 9, 4, (4, 1)),  # the training's keep one each
        (9, 1, 4, (0, 0)),
    ],
)
def test_an_evaluation_takes_the_memory_that_the_trainings_batches_leave(
    num_batches: int, room: int, num_workers: int, expected: tuple[int, int]
) -> None:
    share = share_of(micro_batch_size=6, sample_bytes=100, prefetch_bytes=room * 600, num_workers=num_workers)
    assert share.beside_training(num_batches) == expected


def test_damage_that_fills_a_batch_with_repeats_is_listed_once(tmp_path: Path) -> None:
    shards = photographs(tmp_path / "s")
    damage(shards, 0, 1)
    dataset = dataset_of(shards, shuffle=False, skip=True, epoch="evaluation")
    (batch,) = evaluation_batches(dataset, share_of(micro_batch_size=8), 3)
    assert [damaged.position for damaged in batch.quarantined] == [1]
    assert batch.arrays["weight"].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prefetch_bytes", "num_workers", "prefetch_batches", "expected"),
    [
        (10**9, 4, 3, (4, 3)),
        # Two batches make a step of twelve.
        ((2 + 12) * 600, 4, 3, (4, 3)),
        ((2 + 11) * 600, 4, 3, (4, 2)),
        ((2 + 4) * 600, 4, 3, (4, 1)),
        ((2 + 3) * 600, 4, 3, (3, 1)),
        ((2 + 1) * 600, 4, 3, (1, 1)),
        (2 * 600, 0, 3, (0, 0)),
    ],
)
def test_workers_and_batches_ahead_are_cut_to_the_memory_that_is_allowed(
    prefetch_bytes: int, num_workers: int, prefetch_batches: int, expected: tuple[int, int]
) -> None:
    share = share_of(
        micro_batch_size=6,
        sample_bytes=100,
        prefetch_bytes=prefetch_bytes,
        num_workers=num_workers,
        prefetch_batches=prefetch_batches,
    )
    assert share.within_memory() == expected


def test_a_bound_below_a_step_and_a_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"prefetch_bytes is 1,799; the 2 batches .* and one more, take 1,800"):
        share_of(micro_batch_size=6, sample_bytes=100, prefetch_bytes=1799, num_workers=1).within_memory()


def test_workers_never_make_more_batches_ahead_than_the_bound_holds(shards: ShardSet, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.touch()

    def counted(record: Record, draw: Draw) -> Sample:
        with made.open("ab") as file:
            file.write(b".")
        return make_sample(record, draw)

    share = share_of(num_workers=4, prefetch_batches=5, prefetch_bytes=(2 + 3) * 6 * 800)  # three batches ahead
    batches = training_batches(dataset_of(shards, counted), share, 0, 12)
    for taken in range(1, 9):
        next(batches)
        time.sleep(0.05)  # the workers have time to run ahead, a slow trainer's
        assert made.stat().st_size <= 6 * (taken + 3)
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_of_ours_come_out_of_workers_word_for_word(shards: ShardSet, num_workers: int) -> None:
    def full_disk(record: Record, draw: Draw) -> Sample:
        raise OutputError("the cache's disk is full", "make room")

    batches = training_batches(dataset_of(shards, full_disk, skip=True), share_of(num_workers=num_workers), 0, 1)
    with pytest.raises(OutputError, match=r"^the cache's disk is full\n  next: make room$"):
        next(batches)
