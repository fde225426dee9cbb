"""The machine dies anywhere in a save: what the disk holds then always has a whole checkpoint, and the newest it can.

The save is recorded as a list of file operations, and the crash replayed after each; tests/support/crashes.py says what
may survive one. benchmarks/crashes.py does the same with more mixtures and ranks. The record was once compared with
strace's (one rank, `strace -f -y`, every call that changes files): 75 operations, the same in the same order.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_sweep import record_saves, sweep

NUM_MIXED = 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The operations of three saves by one rank and by two."""
    return {processes: record_saves(tmp_path_factory.mktemp("saves"), processes, num_saves=3) for processes in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_f01_f02_after_a_crash_anywhere_in_a_save_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, recorded: dict[int, list[dict[str, Any]]], processes: int
) -> None:
    operations = recorded[processes]
    kinds = Counter(operation["do"] for operation in operations)
    # Per save: four files of each rank, state.json, manifest.json; the third deletes the first.
    assert kinds["create"] >= 3 * (3 * processes + 2)
    assert kinds["fsync"] >= kinds["create"]
    assert kinds["unlink"] >= 3 * processes + 2
    result = sweep(operations, tmp_path, NUM_MIXED)
    assert result.failures == []
    # The sweep can fail: there were states with a save half done, with one to delete, and with nothing yet.
    assert {0, 1, 2, 3} <= result.whole.keys()
    assert result.num_states > len(operations)


@pytest.mark.parametrize("name", ["optim_states.pt", "state.json", "manifest.json", "step-00000003", "checkpoints"])
def test_f02_a_save_that_forgot_to_flush_would_be_found_out(
    tmp_path: Path, recorded: dict[int, list[dict[str, Any]]], name: str
) -> None:
    operations = recorded[1]
    third = operations.index({"do": "mark", "text": "saving 3"})
    flushes = [n for n, o in enumerate(operations) if n > third and o["do"] == "fsync" and o["path"].endswith(name)]
    assert len(flushes) == 1
    without = [operation for number, operation in enumerate(operations) if number != flushes[0]]
    assert sweep(without, tmp_path, num_mixed=0, first_save=3).failures
