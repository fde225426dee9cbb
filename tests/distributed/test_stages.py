"""Every ZeRO stage and precision: the same first weights, no poisoned update, exact resumption."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
from swinv2_scale.engine.consolidate import ALLOWED_CLASSES, SavedTensors
from tests.support.processes import run_worker
from tests.support.small_run import write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

STAGES = [
    f"{stage} {precision}"
    for stage in range(4)
    for precision in ("fp32", "bf16", "bf16_autocast")
    # Stages 1 and 2 share DeepSpeed's code, which has no branch for autocast.
    if not (stage in (1, 2) and precision == "bf16_autocast")
]
#: What one process runs too: the stage without sharding and the one with most of it.
ALONE = ["0 fp32", "0 bf16", "3 bf16"]

#: Half the work of a step; micro-batches are still added up, and layers sharded, gathered and kept whole.
SMALLER = {
    "depths: [2, 2]": "depths: [1, 1]",
    "micro_batch_size: 4": "micro_batch_size: 2",
    "global_batch_size: 16": "global_batch_size: 8",
    "{backend: torch}": "{backend: none}",
}


def results(folder: Path, shards: Path, processes: int, cases: list[str]) -> dict[str, Any]:
    config = write_config(folder, shards, **SMALLER)
    output = run_worker("stages.py", config, folder / "checkpoints", *cases, processes=processes).output
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    parsed: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return parsed


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("two"), shards, 2, STAGES)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("one"), shards, 1, ALONE)


def test_f21_first_weights_are_the_same_bits_at_any_stage_and_number_of_ranks(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    plain = one["0 fp32"]["initial"]
    for found in (one, two):
        for stage in found:
            if "bf16" in stage.split():
                assert found[stage]["initial"] == one["0 bf16"]["initial"], stage  # rounded once, alike
            else:
                assert found[stage]["initial"] == plain, stage


def test_f21_float32_masters_hold_unrounded_first_weights_in_bf16_too(one: dict[str, Any], two: dict[str, Any]) -> None:
    plain = one["0 fp32"]["initial"]
    assert {found[stage]["initial masters"] for found in (one, two) for stage in found} == {plain}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("poison", ["nan loss", "infinite loss", "gradient"])
def test_a_poisoned_rank_changes_no_weight_on_any(
    one: dict[str, Any], two: dict[str, Any], stage: str, poison: str
) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        assert found[stage][poison] is False
        assert found[stage]["unchanged"]
        assert all(is_applied for _, _, is_applied in found[stage]["losses"])  # and training goes on after it


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_refused_at_the_last_moment_changes_no_weight_and_no_moment(
    one: dict[str, Any], two: dict[str, Any], stage: str
) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        assert found[stage]["refused"] is False
        assert found[stage]["unchanged by a refused one"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_rewind_of_the_live_engine_gives_the_same_bits(one: dict[str, Any], two: dict[str, Any], stage: str) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        assert found[stage]["rewound"] == found[stage]["losses"][1:]
        assert found[stage]["same end after a rewind"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_live_engine_that_begins_again_is_a_fresh_one(one: dict[str, Any], two: dict[str, Any], stage: str) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        assert found[stage]["begun again"] == [found[stage]["initial"], found[stage]["initial masters"]]
        assert found[stage]["same first step"]


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_gives_the_same_bits(one: dict[str, Any], two: dict[str, Any], stage: str) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        assert found[stage]["resumed"] == found[stage]["losses"][1:]
        assert found[stage]["same end"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_gives_every_float32_master_back_whole(
    one: dict[str, Any], two: dict[str, Any], stage: str
) -> None:
    for found in (one, two) if stage in ALONE else (two,):
        weights = SavedTensors(open_run_or_checkpoint(Path(found[stage]["checkpoint"])))
        sha = hashlib.sha256()
        for name in sorted(weights.shapes):
            sha.update(weights.tensor(name).numpy().tobytes())
        assert sha.hexdigest() == found[stage]["published masters"]


def test_stages_compute_the_same_training_in_float32(two: dict[str, Any]) -> None:
    # Sharding changes the order in which gradients are added: float32 rounding, a few steps old.
    reference = [loss for loss, _, _ in two["0 fp32"]["losses"]]
    for stage in (1, 2, 3):
        assert [loss for loss, _, _ in two[f"{stage} fp32"]["losses"]] == pytest.approx(reference, rel=1e-5)


def test_checkpoints_hold_no_class_beyond_the_allowed_three(one: dict[str, Any], two: dict[str, Any]) -> None:
    allowed = {f"{c.__module__}.{c.__qualname__}" for c in ALLOWED_CLASSES}
    assert len(allowed) == 3
    found = {name for run in (one, two) for stage in run for name in run[stage]["unsafe globals"]}
    assert found == allowed
