"""Optimizer states and parameters in host memory and in files: the same training, the same checkpoints, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_worker
from tests.support.small_run import write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

#: Parts and parameters of a MiB and more are swapped, smaller ones stay in memory: both are here. One process adds two
#: micro-batches up, two have one each. Without clipping: DeepSpeed adds the norm up in another order where states are
#: offloaded.
MODEL = (
    *("model.embed_dim=128", "model.num_heads=[4,8]", "model.depths=[1,1]", "optim.clip_grad_norm=0"),
    *("data.global_batch_size=2", "data.micro_batch_size=1", "engine.activation_checkpointing.backend=none"),
    *("optim.ema_decay=0.9", "engine.offload.sub_group_elements=300_000"),
)
STATES = "engine.offload.optimizer_states=nvme"


def results(folder: Path, shards: Path, processes: int, *cases: tuple[int | None, tuple[str, ...]]) -> list[Any]:
    """
    Args:
        cases: the number of the case whose checkpoint it resumes from, and its overrides.
    """
    config = write_config(folder, shards)
    words = [json.dumps({"overrides": [*MODEL, *overrides], "resumes": resumes}) for resumes, overrides in cases]
    output = run_worker("offload.py", config, folder, *words, processes=processes).output
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    found: list[Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[Any]:
    """Two processes: without offloading; with; and resumed the one from the other."""
    on_host = "engine.offload.parameters=cpu"
    cases = [(None, ()), (None, (STATES,)), (0, (STATES, on_host)), (1, ("engine.offload.optimizer_states=cpu",))]
    return results(tmp_path_factory.mktemp("bf16"), shards, 2, *cases)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[Any]:
    """One process, parameters in files too."""
    all_in_files = ("engine.precision=fp32", STATES, "engine.offload.parameters=nvme")
    cases = [(None, ("engine.precision=fp32",)), (0, all_in_files), (None, all_in_files)]
    return results(tmp_path_factory.mktemp("fp32"), shards, 1, *cases)


@pytest.fixture(params=["bf16", "fp32"])
def runs(request: pytest.FixtureRequest) -> list[Any]:
    found: list[Any] = request.getfixturevalue(request.param)
    return found


def test_states_and_parameters_really_lie_in_files(bf16: list[Any], fp32: list[Any]) -> None:
    states = ["ema-", "exp_avg-", "exp_avg_sq-"]
    assert bf16[0]["files"] == bf16[3]["files"] == fp32[0]["files"] == []
    assert bf16[1]["files"] == bf16[2]["files"] == states  # no gradient of a parameter has a MiB
    assert fp32[1]["files"] == fp32[2]["files"] == sorted([*states, "gradient", "param"])


def test_offloaded_training_is_the_same_to_the_bit(runs: list[Any]) -> None:
    plain, *others = runs
    for run in others:
        assert run["losses"] == plain["losses"]
        assert run["end"] == plain["end"]  # masters, moments and average, and how often they were updated


def test_checkpoints_are_the_same_whatever_lies_in_files(runs: list[Any]) -> None:
    plain, *others = runs
    assert plain["saved"].startswith("2 ema exp_avg exp_avg_sq master ")  # the refused update isn't counted
    for run in others:  # written by the run itself, or written again by one that has resumed from it
        assert run["saved"] == plain["saved"]


def test_a_rewind_and_a_new_beginning_reach_what_lies_in_files(runs: list[Any]) -> None:
    for run in runs:
        assert run["rewound"] == run["losses"]
        assert run["loss begun again"] == runs[0]["first loss"]
