"""When a loss or a gradient norm is a spike, and what follows: plain numbers, and a real training's."""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.config.run import AnomaliesConfig
from swinv2_scale.data.ledger import EpochAccount, Ledger
from swinv2_scale.engine.anomalies import Anomaly, Running, Usual, action_after
from swinv2_scale.engine.step import TrainState

#: Loss and gradient norm of the quick start's 350 steps (configs/quickstart/simmim.yaml): the loss falls from 0.98 to
#: 0.34 in the first hundred.
CURVE = Path(__file__).with_name("quickstart_curve.csv")


def curve() -> list[tuple[float, float]]:
    with CURVE.open() as file:
        return [(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]


def alarms(values: list[tuple[float, float]], config: AnomaliesConfig) -> dict[int, Anomaly]:
    """By step, in a training that takes every update it may."""
    usual, found = Usual(), {}
    for step, (loss, grad_norm) in enumerate(values, 1):
        anomaly = usual.find(loss, grad_norm, config)
        if anomaly:
            found[step] = anomaly
        if anomaly is None or not anomaly.is_refused(config):
            usual = usual.with_update(loss, grad_norm, config)
    return found


@pytest.mark.parametrize("warmup_steps", [2, 10, 100])
def test_a_real_training_alarms_at_no_step_even_where_its_loss_falls_fast(warmup_steps: int) -> None:
    assert len(curve()) == 350
    assert alarms(curve(), AnomaliesConfig(warmup_steps=warmup_steps)) == {}


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_spikes_put_into_a_real_training_are_found_each_and_nothing_else(policy: str) -> None:
    values = curve()
    values[199] = (2.0, values[199][1])
    values[200] = (2.0, values[200][1])  # the one before doesn't hide it
    values[259] = (values[259][0], 50.0)
    values[309] = (math.nan, math.nan)
    values[319] = (values[319][0], math.inf)
    found = alarms(values, AnomaliesConfig.model_validate({"policy": policy}))
    assert {step: anomaly.kind for step, anomaly in found.items()} == {
        200: "loss spike",
        201: "loss spike",
        260: "gradient spike",
        310: "non-finite loss",
        320: "non-finite gradient",
    }


def test_nothing_finite_is_a_spike_before_the_warm_up_is_over() -> None:
    values = curve()
    values[98] = (100.0, 1000.0)
    assert alarms(values[:100], AnomaliesConfig(warmup_steps=100)) == {}
    values[20] = (math.inf, 1.0)
    assert list(alarms(values[:100], AnomaliesConfig(warmup_steps=100))) == [21]


def test_a_lasting_change_of_level_is_said_for_a_while_and_then_usual() -> None:
    noise = random.Random(1)
    values = [(level + noise.gauss(0, 0.01), 1.0) for level in [1.0] * 300 + [3.0] * 300]
    found = alarms(values, AnomaliesConfig())
    assert 301 in found
    assert max(found) < 400


def test_an_update_that_was_refused_leaves_the_means_as_they_were() -> None:
    config = AnomaliesConfig(policy="skip", warmup_steps=10)
    values = [(1.0, 1.0)] * 10 + [(5.0, 1.0)] * 50
    assert list(alarms(values, config)) == list(range(11, 61))


def test_a_loss_that_never_changes_alarms_at_eight_percent() -> None:
    usual, config = Usual(), AnomaliesConfig()
    for _ in range(200):
        usual = usual.with_update(2.0, 1.0, config)
    assert usual.find(2.0 * 1.079, 1.0, config) is None
    found = usual.find(2.0 * 1.081, 1.0, config)
    assert found is not None
    assert found.kind == "loss spike"
    assert found.loss_z == pytest.approx(8.1)


def test_losses_of_zero_or_below_are_judged_too() -> None:
    config = AnomaliesConfig(warmup_steps=2)
    usual = Usual()
    for _ in range(3):
        usual = usual.with_update(0.0, 0.0, config)
    assert usual.find(0.0, 0.0, config) is None
    assert usual.find(1.0, 0.0, config) is not None
    negative = Usual(Running(5, -4.0, 0.01), Running(5, 1.0, 0.0))
    assert negative.find(-3.5, 1.0, config) is None
    assert negative.find(-3.0, 1.0, config) is not None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_the_first_means_are_plain_ones(values: list[float]) -> None:
    running = Running()
    for value in values:
        running = running.with_value(value, window=99)  # weights of 2 in 100: plain up to the fiftieth
    # Rounding of sums of up to twenty numbers, squared in the variance.
    assert running.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    assert running.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-3)


SPIKE, NOT_FINITE = Anomaly("loss spike", 9.0, 1.0), Anomaly("non-finite loss")


@pytest.mark.parametrize(
    ("anomaly", "policy", "refused_in_a_row", "rewinds", "action"),
    [
        (SPIKE, "warn", 0, 0, "warn"),
        (SPIKE, "skip", 2, 0, "skip"),
        (SPIKE, "skip", 3, 0, "rewind"),
        (SPIKE, "skip", 3, 1, "stop"),
        (SPIKE, "rewind", 1, 0, "rewind"),
        (SPIKE, "rewind", 1, 1, "stop"),
        (SPIKE, "stop", 1, 0, "stop"),
        (NOT_FINITE, "warn", 1, 0, "skip"),
        (NOT_FINITE, "warn", 3, 0, "rewind"),
        (NOT_FINITE, "stop", 1, 0, "skip"),
        (NOT_FINITE, "rewind", 2, 0, "skip"),
        (NOT_FINITE, "warn", 3, 1, "stop"),
    ],
)
def test_what_follows_is_the_policys_and_refusals_in_a_row_lead_back(
    anomaly: Anomaly, policy: str, refused_in_a_row: int, rewinds: int, action: str
) -> None:
    config = AnomaliesConfig.model_validate({"policy": policy, "max_skipped_steps": 2, "max_rewinds": 1})
    assert action_after(anomaly, refused_in_a_row, rewinds, config) == action


def test_what_is_not_finite_is_refused_whatever_the_policy_and_a_spike_unless_it_is_warn() -> None:
    for policy in ("warn", "skip", "rewind", "stop"):
        config = AnomaliesConfig.model_validate({"policy": policy})
        assert NOT_FINITE.is_refused(config)
        assert SPIKE.is_refused(config) == (policy != "warn")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-8, 1e30), max_size=20))
def test_the_state_of_a_training_survives_json_to_the_bit(losses: list[float]) -> None:
    usual = Usual()
    for loss in losses:
        usual = usual.with_update(loss, loss / 3, AnomaliesConfig(warmup_steps=3))
    account = EpochAccount(1, 2, 3, 4, 2**64 - 1, 2**63, 5)
    state = TrainState(7, 176, 2, 1, Ledger((account,)), usual)
    text = json.dumps({**state.to_json(), "config": {"something": "else"}})
    assert TrainState.from_json(json.loads(text)) == state
