"""How many processes hang in the fork that starts them, right after a collective: data/forks.py's and Python's own.

    .venv/bin/python benchmarks/forks.py > benchmarks/results/forks_HARDWARE_YYYYMM.md

Two ranks; each gathers an object and then starts a process that ends at once, as a rank starts its loader workers, by
one way and the other in turns. A process that hasn't ended after 3 s counts as hung.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from multiprocessing.context import ForkContext

from harness import print_header, print_table, rank_environments

from swinv2_scale import dist
from swinv2_scale.data import forks
from swinv2_scale.telemetry.console import log

WAYS: dict[str, type[ForkContext]] = {"multiprocessing": ForkContext, "data/forks.py": forks.Context}
_WITHIN_S = 3.0


class Replaced(logging.Handler):
    """Counts the warnings of forks that hung and were replaced."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def measure(rounds: int) -> dict[str, int]:
    """Of one rank: how many of ``rounds`` processes hung, by either way, and how many were replaced."""
    dist.start(60)
    replaced = Replaced()
    log().addHandler(replaced)
    forks._PATIENCE_S = _WITHIN_S / 2
    hung = dict.fromkeys(WAYS, 0)
    for _ in range(rounds):
        for name, way in WAYS.items():
            dist.gather(None)
            process = way().Process(target=int)
            process.start()
            process.join(_WITHIN_S)
            if process.is_alive():
                hung[name] += 1
                process.kill()
                process.join()
    return {**hung, "replaced": replaced.count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    options = parser.parse_args()
    if "RANK" in os.environ:
        print(json.dumps(measure(options.rounds)))
        dist.stop()
        return
    print_header("Processes that hang in their fork", ("torch",))
    print(f"- 2 ranks, each {options.rounds:,} processes by either way, in turns")
    command = [sys.executable, __file__, "--rounds", str(options.rounds)]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in rank_environments(2)]
    found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    rows = []
    for name in WAYS:
        hung = sum(rank[name] for rank in found)
        replaced = sum(rank["replaced"] for rank in found) if name == "data/forks.py" else 0
        rows.append((name, f"{2 * options.rounds:,}", hung + replaced, hung))
    print_table(("started by", "processes", "forks that hung", "processes that never ran"), rows)


if __name__ == "__main__":
    main()
