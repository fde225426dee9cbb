"""The machine dies after any file operation of a save: what does the reader find on the disk?

    .venv/bin/python benchmarks/crashes.py > benchmarks/results/crashes_HARDWARE_YYYYMM.md

A real engine (ZeRO-3, bf16) saves four checkpoints, of which two stay, by 1, 2 and 4 processes. The operations are
recorded (tests/support/file_trace.py), replayed up to each of them, and crashed there (tests/support/crashes.py): all
of it is on the disk, only what was flushed is, or a random mixture of 40. In every state the newest whole checkpoint
has to be the last one whose save had returned, or a later one; two are whole as soon as two were; and nothing is taken
for whole that isn't what was saved. Exit code 1 if not.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from machine import describe_machine, describe_versions

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.crash_sweep import record_saves, sweep

NUM_MIXED = 40


def main() -> int:
    print("# Crashes in a save\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print("- command: `.venv/bin/python benchmarks/crashes.py`\n")
    print("| processes | operations | of which | crashes | different states | whole ones found: states | failures |")
    print("|---|---|---|---|---|---|---|")
    failures = []
    for processes in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            operations = record_saves(Path(folder), processes, num_saves=4)
            result = sweep(operations, Path(folder), NUM_MIXED)
        kinds = Counter(operation["do"] for operation in operations if operation["do"] != "mark")
        of_which = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        whole = ", ".join(f"{count}: {number}" for count, number in sorted(result.whole.items()))
        cells = [processes, result.num_operations, of_which, result.crashes.total(), result.num_states, whole]
        print("| " + " | ".join(map(str, [*cells, len(result.failures)])) + " |", flush=True)
        failures += result.failures
    print("\n" + "\n".join(failures or ["No failures."]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
