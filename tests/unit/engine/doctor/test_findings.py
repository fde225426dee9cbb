"""How what many processes found becomes a table."""

import threading
from collections.abc import Sequence

import pytest

from swinv2_scale.engine.doctor.findings import Finding, Process, State, answers, problem, rows, warning


def processes(*findings: Finding, a_node: int = 2) -> list[Process]:
    """One a finding, so many on each host."""
    return [Process(rank, rank % a_node, f"node{rank // a_node}", (found,)) for rank, found in enumerate(findings)]


def only_row(found: Sequence[Process], **advice: str) -> Finding:
    (row,) = rows(found, advice)
    return row


def test_what_one_rank_alone_finds_is_said_with_the_rank_and_its_node() -> None:
    row = only_row(processes(*[Finding("disk", "fine")] * 3, problem("disk", "full", "free some")))
    assert row == Finding("disk", "rank 3 on node1: full", State.PROBLEM, "free some")


def test_what_all_find_is_said_once_without_ranks() -> None:
    assert only_row(processes(*[warning("disk", "small", "look")] * 4)) == warning("disk", "small", "look")


def test_a_problem_outweighs_the_warnings_of_others() -> None:
    row = only_row(processes(warning("disk", "small", "look"), problem("disk", "gone", "mount it")))
    assert (row.state, row.found) == (State.PROBLEM, "rank 1 on node0: gone")


def test_many_ranks_are_counted_and_many_problems_too() -> None:
    row = only_row(processes(*[problem("x", "a")] * 9, *[problem("x", str(n)) for n in range(4)]))
    assert row.found == "ranks 0, 1, 2 and 6 more: a; rank 9 on node4: 0; rank 10 on node5: 1; and 2 others"


def test_where_all_is_well_the_least_speaks() -> None:
    found = processes(*[Finding("memory", f"{amount} GiB", amount=amount) for amount in (20, 12, 31)])
    assert only_row(found).found == "12 GiB"


def test_facts_that_differ_are_a_problem_that_names_the_few() -> None:
    versions = [Finding("versions", "fine", facts={"torch": torch, "numpy": "2"}) for torch in ("2.11", "2.10", "2.11")]
    row = only_row(processes(*versions), versions="take one environment")
    assert row.state is State.PROBLEM
    assert row.found == "torch is 2.10 on rank 1 on node0, 2.11 on the others"
    assert row.advice == "take one environment"


def test_a_fact_that_a_rank_lacks_differs() -> None:
    row = only_row(processes(Finding("x", "fine", facts={"a": "1"}), Finding("x", "fine", facts={"a": "1", "b": "2"})))
    assert row.found == "b is 2 on rank 1 on node0, nothing on the others"


def test_what_hangs_is_left_behind_and_the_rest_is_answered() -> None:
    forever = threading.Event()

    def fail() -> None:
        raise OSError("broken")

    found = answers({"hangs": forever.wait, "works": lambda: 1, "fails": fail}, 0.2)
    forever.set()
    assert found["works"] == 1
    assert isinstance(found["fails"], OSError)
    assert isinstance(found["hangs"], TimeoutError)


@pytest.mark.parametrize("count", [1, 512])
def test_a_table_of_many_ranks_is_as_short_as_one_of_one(count: int) -> None:
    found = processes(*[Finding("x", "fine", facts={str(key): "1" for key in range(100)})] * count, a_node=8)
    assert rows(found, {}) == [found[0].findings[0]]
