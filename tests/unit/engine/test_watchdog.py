"""What a job says about the rank that it waits for, and when."""

import time
from pathlib import Path

import pytest

from swinv2_scale.config.run import ClusterConfig
from swinv2_scale.engine.watchdog import Beat, Watchdog, missing_ranks


def beats(*ranks: tuple[int, int, str], first_number: int = 7) -> list[Beat]:
    """One of each (phases entered, step, phase), on two hosts."""
    return [
        Beat(first_number + rank, phases, step, phase, f"node{rank // 2}")
        for rank, (phases, step, phase) in enumerate(ranks)
    ]


def later(before: list[Beat], *silent: int) -> list[Beat]:
    """Beats of some seconds later, when only the silent ranks have written none."""
    return [
        beat if rank in silent else Beat(beat.number + 3, beat.phases, beat.step, beat.phase, beat.host)
        for rank, beat in enumerate(before)
    ]


def test_a_rank_whose_beat_stays_the_same_is_silent() -> None:
    before = beats((9, 4, "training"), (9, 4, "training"), (8, 4, "waiting for samples"))
    assert missing_ranks(before, later(before, 2)) == (
        "rank 2 on node1 no longer answers, last seen at step 4 (waiting for samples)"
    )


def test_a_silent_rank_is_named_rather_than_one_that_is_behind() -> None:
    before = beats((9, 4, "training"), (8, 4, "waiting for samples"), (9, 4, "training"))
    assert missing_ranks(before, later(before, 2)).startswith("rank 2 on node1 no longer answers")


def test_a_rank_that_answers_but_is_in_an_earlier_phase_is_named_with_it() -> None:
    before = beats((9, 4, "training"), (9, 4, "training"), (8, 4, "waiting for samples"), (9, 4, "training"))
    assert missing_ranks(before, later(before)) == "rank 2 on node1 is still at step 4 (waiting for samples)"


def test_all_ranks_behind_are_named_and_many_are_counted() -> None:
    before = beats(*[(9 if rank < 2 else 8, 4, "saving a checkpoint") for rank in range(8)])
    said = missing_ranks(before, later(before))
    assert [rank for rank in range(8) if f"rank {rank} " in said] == [2, 3, 4, 5]
    assert said.endswith("; and 2 more")


def test_when_all_are_alike_it_says_so() -> None:
    before = beats((9, 4, "training"), (9, 4, "training"))
    assert missing_ranks(before, later(before)) == "all 2 ranks answer, and all are at step 4 (training)"


def test_before_the_first_step_there_is_only_a_phase() -> None:
    before = beats((2, 0, "opening the data"), (1, 0, "starting"))
    assert missing_ranks(before, later(before)) == "rank 1 on node0 is still at the start (starting)"


def test_a_single_process_notes_its_stacks_once_for_a_steady_step_that_takes_too_long(tmp_path: Path) -> None:
    logs = {is_steady: tmp_path / f"{is_steady}.log" for is_steady in (True, False)}
    watchdogs = {key: Watchdog(ClusterConfig(timeout_s=3600, step_timeout_s=1), log) for key, log in logs.items()}
    for is_steady, watchdog in watchdogs.items():
        watchdog.start()
        watchdog.enter("training", 2, is_steady)
    try:
        wait_for(logs[True])
    finally:
        for watchdog in watchdogs.values():
            watchdog.stop()
    said = logs[True].read_text()
    assert said.count("the stacks of all threads") == 1
    assert " s at step 2 (training)" in said
    assert "in wait_for" in said
    assert not logs[False].exists(), "the first step has the long time-out"


def wait_for(path: Path) -> None:
    """Until it is there, and for long enough to be noted twice."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(2.5)


@pytest.mark.parametrize("num_items", [0, 3])
def test_each_hands_out_all_items(tmp_path: Path, num_items: int) -> None:
    watchdog = Watchdog(ClusterConfig(), tmp_path / "log")
    assert list(watchdog.each(iter(range(num_items)), "validating", 4)) == list(range(num_items))
