"""Typed errors: what they say, how they end the process, and how they travel between ranks."""

import copy
import inspect
import os
import pickle

import pytest

from swinv2_scale import errors
from swinv2_scale.errors import ConfigError, ConfigProblem, ExitCode, ScaleError

ALL_ERRORS = sorted(
    (c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ScaleError)), key=lambda c: c.__name__
)
PROBLEMS = (
    ConfigProblem("optim.lrr", "no such key", "run.yaml:3", "optim.lr"),
    ConfigProblem("seed", "is required"),
)


def after_travel(error: ScaleError) -> ScaleError:
    """What another rank sees; torch.distributed pickles objects to gather them."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes


def test_all_the_error_classes_are_tested_here():
    assert len(ALL_ERRORS) >= 8
    assert ScaleError in ALL_ERRORS


@pytest.mark.parametrize("next_step", ["", "do the other thing"])
@pytest.mark.parametrize("cls", ALL_ERRORS)
def test_an_error_arrives_at_another_rank_as_it_left(cls, next_step):
    error = cls("it broke at rank 3", next_step)
    arrived = error
    for _ in range(3):
        arrived = after_travel(arrived)
        assert type(arrived) is cls
        assert str(arrived) == str(error)
        assert (arrived.message, arrived.next_step) == (error.message, error.next_step)
        assert arrived.exit_code is error.exit_code


def test_a_configuration_error_arrives_with_its_problems_said_once():
    error = ConfigError("run.yaml has 2 problems:", "correct them", PROBLEMS)
    arrived = after_travel(after_travel(error))
    assert isinstance(arrived, ConfigError)
    assert arrived.problems == PROBLEMS
    assert str(arrived) == str(error)
    assert str(arrived).count("optim.lrr") == 1


@pytest.mark.parametrize("cls", ALL_ERRORS)
def test_an_error_can_be_copied(cls):
    error = cls("message", "next")
    for duplicate in (copy.copy(error), copy.deepcopy(error)):
        assert type(duplicate) is cls
        assert str(duplicate) == str(error)


@pytest.mark.parametrize("cls", ALL_ERRORS)
def test_an_error_can_carry_notes_and_attributes_between_ranks(cls):
    error = cls("message")
    error.add_note("seen on node 7")
    assert after_travel(error).__notes__ == ["seen on node 7"]


@pytest.mark.parametrize("cls", ALL_ERRORS)
def test_every_error_ends_the_process_with_a_failure_that_a_shell_can_see(cls):
    assert isinstance(cls.exit_code, ExitCode)
    assert 0 < cls.exit_code < 126  # 126 and more are the shell's own


@pytest.mark.parametrize(
    ("code", "sysexits"),
    [
        (ExitCode.DONE, os.EX_OK),
        (ExitCode.BAD_DATA, os.EX_DATAERR),
        (ExitCode.DIVERGED, os.EX_SOFTWARE),
        (ExitCode.CANNOT_WRITE, os.EX_CANTCREAT),
        (ExitCode.PEER_LOST, os.EX_TEMPFAIL),
        (ExitCode.BAD_CONFIG, os.EX_CONFIG),
        (ExitCode.STOPPED, 85),  # SLURM scripts requeue on it; sysexits.h ends at 78
    ],
)
def test_exit_codes_are_those_of_sysexits(code, sysexits):
    assert int(code) == sysexits


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 78),
        ("ClusterError", 78),
        ("DataError", 65),
        ("CheckpointError", 65),
        ("DivergedError", 70),
        ("OutputError", 73),
        ("PeerLostError", 75),
    ],
)
def test_each_kind_of_trouble_has_its_exit_code(name, code):
    assert getattr(errors, name).exit_code == code


def test_an_error_says_what_to_do_next_on_a_line_of_its_own():
    assert str(ScaleError("no space left", "delete something")).splitlines() == [
        "no space left",
        "  next: delete something",
    ]
    assert str(ScaleError("no space left")) == "no space left"


def test_names_from_outside_cannot_command_the_terminal_that_an_error_is_shown_on():
    error = ScaleError("no file \x1b]0;owned\x07\x1b[2Jé\udcff\r", "look\nagain")
    assert str(error) == "no file \ufffd]0;owned\ufffd\ufffd[2Jé\ufffd\ufffd\n  next: look\nagain"


def test_a_configuration_error_lists_every_problem_with_place_and_suggestion():
    error = ConfigError("run.yaml has 2 problems:", "correct them", PROBLEMS)
    assert str(error).splitlines() == [
        "run.yaml has 2 problems:",
        "  - run.yaml:3: optim.lrr: no such key (did you mean optim.lr?)",
        "  - seed: is required",
        "  next: correct them",
    ]
