"""Every fault of a shard costs exactly the samples that it hits, in the loader and in ``shards verify``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swinv2_scale.config.run import RemoteConfig, RunConfig
from swinv2_scale.data.images.decode import decode_class
from swinv2_scale.data.inspection.verify import verify
from swinv2_scale.data.ledger import Ledger
from swinv2_scale.data.loader import MakeSample, PositionDataset, Sample, Share, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.draws import Draw
from swinv2_scale.errors import SampleError
from swinv2_scale.tasks.simmim import SimMIMTask
from tests.support.mutants import CANARY, HIT, MUTANTS, NUM_SAMPLES, Mutant, write_mutant

BATCH = 8
LABEL_FAULTS = [mutant for mutant in MUTANTS if mutant.only_for_labels]


def task(decoder: str = "fast") -> SimMIMTask:
    return SimMIMTask(
        RunConfig.model_validate(
            {
                "model": {"variant": "tiny", "image_size": 32, "window_size": 4},
                "data": {"train": "", "global_batch_size": BATCH, "micro_batch_size": BATCH, "decoder": decoder},
                "task": {"mask_patch_size": 32},
                "optim": {"lr": 1e-3, "total_steps": 10},
            }
        )
    )


def with_label(record: Record, draw: Draw) -> Sample:
    """What a classification does: image and label."""
    decode_class(record, 3)
    return task().training_sample(record, draw)


def read_epoch(folder: Path, make_sample: MakeSample) -> tuple[set[tuple[int, int]], list[str], int]:
    """(samples in quarantine, their causes, samples that were read) of one epoch, whose end is asserted."""
    shards = read_shard_set(f"{folder}/{{000000..000002}}.tar")
    order = Order.of(shards.sizes, 0, True, 2)
    dataset = PositionDataset(ShardReader(shards), order, make_sample, skip_damaged=True)
    share = Share(BATCH, BATCH, 0, 1, 0, 1, 2**30, task().sample_bytes)
    ledger, lost, over = Ledger(), [], []
    for step, batch in enumerate(training_batches(dataset, share, 0, NUM_SAMPLES // BATCH)):
        assert batch.arrays["images"].shape == (BATCH, 3, 32, 32)
        ledger = ledger.with_step(order.epochs(step * BATCH, (step + 1) * BATCH), batch.tally.tolist())
        ledger, over = ledger.closed(order, (step + 1) * BATCH)
        lost += batch.quarantined
    (account,) = over
    assert account.quarantined == len(lost)
    return {(int(Path(q.shard).stem), q.sample) for q in lost}, [q.cause for q in lost], account.consumed


@pytest.mark.parametrize("decoder", ["fast", "exact"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_f11_f12_exactly_the_samples_that_a_fault_hits_are_replaced(
    tmp_path: Path, mutant: Mutant, decoder: str
) -> None:
    CANARY.unlink(missing_ok=True)
    folder = write_mutant(tmp_path / "s", mutant)
    lost, causes, consumed = read_epoch(folder, task(decoder).training_sample)
    assert lost == mutant.lost
    assert consumed + len(lost) == NUM_SAMPLES
    assert all(causes)
    assert not CANARY.exists()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_f11_f12_what_stops_a_run_is_said_before_the_first_step_or_at_the_sample(
    tmp_path: Path, mutant: Mutant
) -> None:
    folder = write_mutant(tmp_path / "s", mutant)
    shards = read_shard_set(f"{folder}/{{000000..000002}}.tar")
    assert bool(shards.file_problems()) == mutant.is_seen_by_size
    order = Order.of(shards.sizes, 0, False, 1)
    dataset = PositionDataset(ShardReader(shards), order, task().training_sample, skip_damaged=False)
    refused = []
    for position in range(NUM_SAMPLES):
        item = dataset[position]
        if isinstance(item, SampleError):
            place = order.locate(position)
            refused.append((place.shard, place.sample))
            assert "data.max_quarantined_share" in item.next_step
            assert f"{place.shard:06d}.tar" in item.message
    assert set(refused) == mutant.lost


@pytest.mark.parametrize("mutant", LABEL_FAULTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_f12_a_task_with_labels_replaces_samples_whose_label_is_no_class(tmp_path: Path, mutant: Mutant) -> None:
    lost, causes, consumed = read_epoch(write_mutant(tmp_path / "s", mutant), with_label)
    assert lost == {HIT}
    assert "label" in causes[0]
    assert consumed == NUM_SAMPLES - 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_f11_f12_verify_finds_what_training_would_stumble_over(tmp_path: Path, mutant: Mutant) -> None:
    folder = write_mutant(tmp_path / "s", mutant)
    verdict = verify(f"{folder}/{{000000..000002}}.tar", RemoteFiles(RemoteConfig()), str(tmp_path / "apart"))
    expected = {HIT} if mutant.only_for_labels else mutant.lost
    assert verdict.num_damaged == len(expected)
    assert verdict.is_whole == (not expected and not mutant.is_seen_by_size)
    if verdict.damaged:  # a lost shard's samples are counted, not listed
        assert {(int(Path(d.shard).stem), d.number) for d in verdict.damaged} == expected


def test_f12_turned_images_are_shown_upright_and_sixteen_bits_are_not_clipped(tmp_path: Path) -> None:
    """What the loader hands over for these, not only that it does."""
    found = {}
    for mutant in MUTANTS:
        if mutant.name in ("JPEG turned by its EXIF note", "16-bit PNG"):
            shards = read_shard_set(f"{write_mutant(tmp_path / mutant.name, mutant)}/*.tar")
            record = ShardReader(shards).read(*HIT)
            found[mutant.name] = torch.from_numpy(task().evaluation_sample(record, Draw(0, 0, "a"))["images"]).float()
    turned, sixteen = found["JPEG turned by its EXIF note"], found["16-bit PNG"]
    plain = read_shard_set(f"{write_mutant(tmp_path / 'plain', MUTANTS[0])}/*.tar")
    upright = torch.from_numpy(
        task().evaluation_sample(ShardReader(plain).read(*HIT), Draw(0, 0, "a"))["images"]
    ).float()
    # EXIF 6: the camera lay on its side; the picture is to be turned clockwise by a quarter.
    assert (turned - upright.rot90(-1, (1, 2))).abs().mean() < 3
    # A ramp from 0 to 65,229 in rows of 40 stays a ramp: its brightest row is near 255, its darkest near 0.
    assert sixteen[0, 0].mean() < 12
    assert sixteen[0, -1].mean() > 240
    assert (sixteen[0].mean(1).diff() > 0).all()
