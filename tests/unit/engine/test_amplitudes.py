"""The largest output of every block, as a plain forward pass gives it, and where numbers stop being finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine import activation_checkpointing, zero
from swinv2_scale.engine.amplitudes import AmplitudeMeter, Amplitudes
from swinv2_scale.models.initialise import initial_values
from swinv2_scale.tasks.simmim import SimMIM
from tests.support.small_run import write_config

PLACES = ("embedding", "stage 0 block 0", "stage 0 block 1", "stage 1 block 0", "stage 1 block 1")


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    dist.start(30)
    yield
    dist.stop()


@pytest.fixture
def model(tmp_path: Path) -> SimMIM:
    """Weights drawn, branches not zero as they are at first: every block does something."""
    config = load_config(str(write_config(tmp_path, tmp_path)), []).config
    model = SimMIM(config)
    zero.assign(model, initial_values(model, zero.full_shapes(model), 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(0.7)
    activation_checkpointing.apply(model, config.engine.activation_checkpointing)
    return model


def batch(seed: int, scale: int = 255) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, scale, (3, 1, 32, 32), generator=random, dtype=torch.uint8)
    return images, torch.rand((3, 8, 8), generator=random) < 0.6


def by_hand(model: SimMIM, images: Tensor, hidden: Tensor) -> list[float]:
    encoder = model.encoder
    with torch.no_grad():
        x, size = encoder.patch_embed(model.normalised(images))
        found = [x.abs().max()]
        x = torch.where(hidden.flatten(1)[..., None], model.mask_token, x)
        for stage in encoder.layers:
            for block in stage.blocks:  # type: ignore[union-attr]
                x = block(x, size)
                found.append(x.abs().max())
            if stage.downsample is not None:
                x, size = stage.downsample(x, size)  # type: ignore[operator]
    return [float(value) for value in found]


def test_amplitudes_are_the_largest_of_a_steps_micro_batches(model: SimMIM) -> None:
    model.eval()
    first, second = by_hand(model, *batch(1)), by_hand(model, *batch(2))
    meter = AmplitudeMeter(model.train())
    model(*batch(3))
    meter.clear()
    for seed in (1, 2):
        losses, _ = model(*batch(seed))
        losses.mean().backward()  # recomputes the blocks
    model.eval()
    model(*batch(4))  # a validation in between
    read = meter.read()
    assert read.places == PLACES
    assert list(read.by_rank[0]) == [max(pair) for pair in zip(first, second, strict=True)]
    assert read.first_non_finite is None
    assert str(read).endswith("; all finite")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_block_where_numbers_stop_being_finite_is_named(model: SimMIM, value: float) -> None:
    with torch.no_grad():
        model.encoder.layers[1].blocks[0].norm2.bias[3] = value  # type: ignore[union-attr, index]
    meter = AmplitudeMeter(model.train())
    model(*batch(1))
    read = meter.read()
    assert read.first_non_finite == ("stage 1 block 0", 0)
    assert all(math.isfinite(read.largest[place]) for place in PLACES[:3])


def test_numbers_of_all_ranks_are_one_line() -> None:
    read = Amplitudes(PLACES, ((1.0, 2.0, 3.0, 4.0, 5.0), (1.5, 1.0, math.inf, math.nan, math.nan)))
    assert list(read.largest.values())[:3] == [1.5, 2.0, math.inf]
    assert str(read) == (
        "embedding: 1.5 | stage 0: 2 inf | stage 1: nan nan; first non-finite: stage 0 block 1 on rank 1"
    )
