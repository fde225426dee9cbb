"""The README's speeds are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_table_of_speeds_is_what_the_results_say() -> None:
    command = [sys.executable, "benchmarks/suite.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
