"""What offloading takes from a GPU, and where it goes."""

from __future__ import annotations

from typing import Any

import pytest

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.plan.fit import changed, memory, ways_to_fit
from swinv2_scale.plan.machines import DEVICES, Cluster
from swinv2_scale.plan.zero import Sharding, States, states
from tests.support.processes import REPOSITORY

GIANT = load_config(REPOSITORY / "configs/stages/giant/simmim_192w12.yaml").config
NUMEL = 3_010_430_176
#: One GPU, one image of 1536 px, attention sequential throughout.
LARGE: dict[str, Any] = {
    "model.image_size": 1536,
    "data.micro_batch_size": 1,
    "data.global_batch_size": 1,
    "model.attention.backend": "sequential",
    "engine.reduce_bucket_elements": 50_000_000,
}


def giant(**places: str) -> RunConfig:
    settings = {f"engine.offload.{key}": place for key, place in places.items()}
    return changed(GIANT, {"engine.offload.nvme_dir": "/scratch", **settings})


def held(world_size: int, config: RunConfig) -> States:
    return states(Sharding.of(config, world_size))


def test_optimizer_states_on_the_host_leave_masters_moments_and_gradients_there() -> None:
    plain, offloaded = held(64, GIANT), held(64, giant(optimizer_states="cpu"))
    assert offloaded.masters == offloaded.moments == offloaded.gradients == offloaded.disk == 0
    # Beside the sums of gradients, the float32 ones that the update reads.
    assert offloaded.host == plain.masters + plain.moments + 2 * plain.gradients
    # One micro-batch a step: they stay as narrow as they come.
    alone = held(64, changed(giant(optimizer_states="cpu"), {"data.global_batch_size": 18 * 64}))
    assert offloaded.host - alone.host == plain.gradients // 2
    assert offloaded.weights == plain.weights


def test_the_giants_states_in_files_are_48_gb() -> None:
    found = held(1, giant(optimizer_states="nvme"))
    assert found.disk == 16 * NUMEL  # master, two moments and the gradient, float32
    alone = held(1, changed(giant(optimizer_states="nvme"), {"data.global_batch_size": 18}))
    buffers = 4 * 4 * Sharding.of(giant(), 1).largest_sub_group
    assert alone.host == 2 * NUMEL + buffers
    assert found.host == 4 * NUMEL + buffers
    assert found.gradients == 0


def test_a_sub_group_ends_with_the_parameter_that_fills_it() -> None:
    largest_weight = 4096 * 16384
    for size in (1, 50_000_000, 10**9):
        found = Sharding.of(changed(GIANT, {"engine.offload.sub_group_elements": size}), 1).largest_sub_group
        assert largest_weight <= found < size + largest_weight


def test_an_average_is_one_more_file_and_one_more_buffer() -> None:
    config = giant(optimizer_states="nvme")
    plain, average = held(8, config), held(8, changed(config, {"optim.ema_decay": 0.9999}))
    part = Sharding.of(config, 8).part
    assert average.disk - plain.disk == 4 * part
    assert average.host - plain.host == 4 * Sharding.of(config, 8).largest_sub_group


@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_offloaded_parameters_leave_the_gpu(place: str) -> None:
    plain, offloaded = held(8, GIANT), held(8, giant(parameters=place))
    assert offloaded.weights == 0 < plain.weights
    assert (offloaded.host if place == "cpu" else offloaded.disk) == plain.weights


def test_a_whole_step_of_the_giant_at_1536_px_fits_one_80_gb_card_and_offloaded_a_16_gb_one() -> None:
    for window in (32, 48):
        config = changed(GIANT, {**LARGE, "model.window_size": window})
        assert memory(config, 1).total < 62 * 2**30 < DEVICES["a100-80"].memory_bytes
        changes = ways_to_fit(config, Cluster(DEVICES["a100"], 1, 1))
        assert changes[-1].overrides == ("engine.offload.optimizer_states=cpu",)
        assert changes[-1].total < 16 * 2**30
