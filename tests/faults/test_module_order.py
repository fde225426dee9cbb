"""F20: under ZeRO-3 a rank that skips a module waits for ever for one that doesn't. Drop path must skip none."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.processes import run_worker
from tests.support.small_run import write_config


def test_f20_every_rank_calls_every_module_in_one_order_however_many_branches_are_dropped(
    tmp_path: Path, shards: Path
) -> None:
    """Drop path 0.9, other samples on each rank, ZeRO-3; a hang ends at the deadline of tests/support/processes.py."""
    output = run_worker("module_order.py", write_config(tmp_path, shards), processes=2).output
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    first, second = json.loads(line.removeprefix("RESULT "))
    assert first["called"] == second["called"]
    assert first["losses"] == second["losses"]
    blocks = {f"encoder.layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)}
    assert blocks <= set(first["called"])
    assert first["dropped"] != second["dropped"]
