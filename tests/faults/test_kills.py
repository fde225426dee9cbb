"""A run that is killed again and again ends as one that never was. benchmarks/kills.py has the long versions."""

import pytest

from tests.support.kills import Course, Death, End, Kill, chain

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("shards"), total_steps=12, save_every=4, epoch=30)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, course: Course) -> End:
    return course.finish(tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, course: Course) -> tuple[list[Death], End]:
    """Three lives, one of them killed in its save, one in its load, one where an epoch turns, and the end."""
    run = tmp_path_factory.mktemp("killed") / "run"
    kills = [Kill("save", 1, 0.0, (1,)), Kill("load", 1, 0.5, (0, 1)), Kill("epoch turn", 1, 0.5, (0,))]
    return list(chain(course, run, kills)), course.finish(run)


def test_f01_a_chain_of_kills_costs_a_save_interval_each_and_changes_no_bit_of_masters_and_moments(
    unbroken: End, killed: tuple[list[Death], End]
) -> None:
    deaths, end = killed
    assert [death.step >= 4 for death in deaths] == [True, False, True]
    assert end.tensors == unbroken.tensors


def test_f08_f22_losses_gradients_and_learning_rates_are_those_of_the_unbroken_run(
    unbroken: End, killed: tuple[list[Death], End]
) -> None:
    _, end = killed
    names = ("step", "loss", "lr", "grad_norm", "validation_loss")
    assert [[row[name] for name in names] for row in end.rows] == [[r[name] for name in names] for r in unbroken.rows]
    assert end.generators == unbroken.generators


def test_f09_every_step_has_the_samples_of_the_unbroken_run(unbroken: End, killed: tuple[list[Death], End]) -> None:
    _, end = killed
    for name in ("samples_seen", "data_digest"):
        assert [row[name] for row in end.rows] == [row[name] for row in unbroken.rows]
    assert len({row["data_digest"] for row in end.rows}) == 12
