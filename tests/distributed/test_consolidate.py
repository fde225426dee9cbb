"""Masters of a model with awkward parameters, written by more ranks than some of them have values."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
from swinv2_scale.engine.consolidate import SavedTensors
from tests.support.processes import run_worker

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

#: tests/distributed/test_stages.py has the real model at every stage and precision, on one and two ranks.
CASES = ["0 fp32", "1 fp32", "1 bf16", "2 fp32", "2 bf16", "3 fp32", "3 bf16"]
FROZEN = ["frozen", "frozen_too"]


def digest(weights: SavedTensors, names: list[str]) -> str:
    return hashlib.sha256(b"".join(weights.tensor(name).numpy().tobytes() for name in names)).hexdigest()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = run_worker("masters.py", tmp_path_factory.mktemp("three"), *CASES, processes=3).output
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    parsed: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return parsed


@pytest.mark.parametrize("case", CASES)
def test_every_float32_master_comes_back_whole_from_three_ranks(three: dict[str, Any], case: str) -> None:
    weights = SavedTensors(open_run_or_checkpoint(Path(three[case]["checkpoint"])))
    assert digest(weights, sorted(set(weights.shapes) - set(FROZEN))) == three[case]["masters"]


@pytest.mark.parametrize("case", CASES)
def test_frozen_parameters_come_back_too(three: dict[str, Any], case: str) -> None:
    weights = SavedTensors(open_run_or_checkpoint(Path(three[case]["checkpoint"])))
    assert digest(weights, FROZEN) == three[case]["frozen"]


@pytest.mark.parametrize("case", CASES)
def test_parameters_have_the_model_s_shapes_in_its_order_and_buffers_are_none(three: dict[str, Any], case: str) -> None:
    weights = SavedTensors(open_run_or_checkpoint(Path(three[case]["checkpoint"])))
    assert [(name, tuple(shape)) for name, shape in weights.shapes.items()] == [
        ("frozen", (5, 3)),
        ("temperature", (1, 1)),
        ("gain", (1,)),
        ("frozen_too", (1,)),
        ("embed.weight", (13, 7)),
        ("embed.bias", (13,)),
        ("wide.weight", (101, 13)),
        ("wide.bias", (101,)),
        ("head.weight", (1, 101)),
    ]
    for name, shape in weights.shapes.items():
        assert (weights.tensor(name).shape, weights.tensor(name).dtype.itemsize) == (shape, 4)
