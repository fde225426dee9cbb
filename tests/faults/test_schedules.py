"""F22: learning rate and weight decay of a run that was resumed in the warm-up, at the peak, and after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import Finished, pretrain
from tests.support.small_run import LIGHT, metrics, write_config

SHORT = ("optim.warmup_steps=2", "optim.total_steps=6", "optim.weight_decay=0.3", "data.num_workers=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards, **{"every_steps: 10": "every_steps: 0"})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(config, run)
    return run


def train(config: Path, run: Path, steps: int = 6, *overrides: str) -> Finished:
    """One process; it has the deadline of tests/support/processes.py."""
    finished = pretrain("--config", config, "--run-dir", run, "--steps", steps, *LIGHT, *SHORT, *overrides)
    assert finished.code == 0, finished.output
    return finished


def rates(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [float(row["lr"]).hex() for row in rows]


def test_f22_rates_are_the_same_to_the_last_bit_wherever_a_run_was_stopped(
    tmp_path: Path, config: Path, unbroken: Path
) -> None:
    """After step 1 (in the warm-up), 2 (at the peak) and 4; losses and gradients show the weight decay's part."""
    for step in (1, 2, 4, 6):
        train(config, tmp_path / "run", step)
    assert rates(tmp_path / "run") == rates(unbroken)
    assert rates(unbroken)[1] == rates(unbroken)[2] == (2e-3).hex()  # the peak
    assert len(set(rates(unbroken))) == 4  # half of it comes twice, going up and going down
    assert metrics(tmp_path / "run") == metrics(unbroken)


def test_f22_a_weight_decay_that_was_changed_takes_effect_from_the_next_update_on(
    tmp_path: Path, config: Path, unbroken: Path
) -> None:
    train(config, tmp_path / "run", 2)
    changed = train(config, tmp_path / "run", 4, "optim.weight_decay=30")
    assert "optim.weight_decay: was 0.3, now 30.0 - may change, changes the numbers" in changed.output
    ours, theirs = metrics(tmp_path / "run"), metrics(unbroken)[:4]
    assert ours[:3] == theirs[:3]  # the third loss is of the weights before the first update with it
    assert ours[3]["loss"] != theirs[3]["loss"]
    assert rates(tmp_path / "run") == rates(unbroken)[:4]
