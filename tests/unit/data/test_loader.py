"""Batches: the same samples for any rank count, worker count and starting step."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.data.loader import Batch, Sample, evaluation_batches, sample_digest, training_batches
from swinv2_scale.data.manifest import INDEX_ENTRY, ShardSet, index_path, read_shard_set
from swinv2_scale.data.order import Order
from swinv2_scale.data.reader import Record, ShardReader
from swinv2_scale.data.sources import fashion_mnist
from swinv2_scale.data.writer import write_shards
from swinv2_scale.draws import Draw
from swinv2_scale.errors import DataError

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
    return Order(shards.sizes, seed=3, shuffle=shuffle, shuffle_shards=3)


def train(shards: ShardSet, **options: int) -> list[Batch]:
    """Batches of steps 0 to 5 in one process unless told otherwise: six steps of 12, almost two epochs of 40."""
    wanted = {
        "start_step": 0,
        "end_step": 6,
        "global_batch_size": 12,
        "micro_batch_size": 6,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
        "prefetch_batches": 2,
        **options,
    }
    return list(training_batches(shards, order_of(shards), make_sample, **wanted))


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
def test_ranks_together_read_the_samples_of_one_process_in_its_order(
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_a_data_error_at_the_batch_that_needs_it(tmp_path: Path, num_workers: int) -> None:
    shards = photographs(tmp_path / "s")
    place = order_of(shards).locate(20)  # in the second step's second micro-batch
    path = shards.paths[place.shard]
    offset, length, _ = INDEX_ENTRY.unpack_from(index_path(path).read_bytes(), place.sample * INDEX_ENTRY.size)
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)
    batches = training_batches(
        shards,
        order_of(shards),
        make_sample,
        start_step=0,
        end_step=6,
        global_batch_size=12,
        micro_batch_size=6,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        prefetch_batches=2,
    )
    for _ in range(3):
        next(batches)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert f"{path}: sample {place.sample} " in caught.value.message
    assert caught.value.next_step
    assert "Traceback" not in str(caught.value)


def test_an_iterator_left_open_does_not_keep_the_process_from_ending(shards: ShardSet) -> None:
    script = (
        "import sys, pathlib\n"
        "from swinv2_scale.data.loader import training_batches\n"
        "from swinv2_scale.data.manifest import read_shard_set\n"
        "from swinv2_scale.data.order import Order\n"
        "shards = read_shard_set(sys.argv[1])\n"
        "batches = training_batches(shards, Order(shards.sizes, 0, True, 4), lambda record, draw: {}, start_step=0,\n"
        "    end_step=9, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, num_workers=1,\n"
        "    prefetch_batches=1)\n"
        "next(batches)\n"
    )
    pattern = str(shards.paths[0].parent / "*.tar")
    ended = subprocess.run([sys.executable, "-c", script, pattern], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def refuse(record: Record, draw: Draw) -> Sample:
    raise DataError(f"{record.name} is refused", "do something else")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_the_task_refuses_is_the_tasks_error_word_for_word(shards: ShardSet, num_workers: int) -> None:
    batches = training_batches(
        shards,
        order_of(shards),
        refuse,
        start_step=0,
        end_step=1,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        prefetch_batches=1,
    )
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
    ranks = [
        list(
            evaluation_batches(
                shards,
                order_of(shards, shuffle=False),
                make_sample,
                num_samples=num_samples,
                micro_batch_size=4,
                rank=rank,
                world_size=world_size,
            )
        )
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
            for batch in evaluation_batches(
                shards,
                order_of(shards, shuffle=False),
                make_sample,
                num_samples=30,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            ):
                found.update(zip(batch.arrays["number"].tolist(), batch.arrays["random"].tolist(), strict=True))
        return found

    wanted = draws(1, 8)
    assert len(set(wanted.values())) == 30
    assert draws(1, 8) == draws(2, 4) == draws(3, 5) == wanted
