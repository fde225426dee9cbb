"""Time and memory of the quick start, as a user types it (after `make setup`):

    .venv/bin/python benchmarks/quickstart.py > benchmarks/results/quickstart_HARDWARE_YYYYMM.md

Types `make pretrain` with a new run directory and new shards, watches the whole process tree, and prints a Markdown
page with the raw output. Memory is the proportional set size (PSS) summed over all processes of
the tree, sampled four times a second: shared pages count once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = ["make", "pretrain", f"ARGS=--run-dir {folder}/run data.shards_dir={folder}/shards"]
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        memory = PeakMemory(process.pid)
        first_step = 0.0
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not first_step and re.search(r" step 1/", line):
                first_step = time.monotonic() - started
        code = process.wait()
        total = time.monotonic() - started
        peak = memory.stop()
    print("# Quick start\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'webdataset', 'numpy')}")
    print(f"- command: `{' '.join(command).replace(folder, 'FOLDER')}` (exit code {code})")
    print(f"- first training step after {first_step:.1f} s (shards written on the way)")
    print(f"- all of it after {total:.1f} s")
    print(f"- peak memory of all processes together: {peak / 2**30:.2f} GiB\n")
    print("```\n" + "".join(lines).replace(folder, "FOLDER").strip() + "\n```")


class PeakMemory:
    """Samples a process tree in a thread."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            total = 0
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            self._peak = max(self._peak, total)


if __name__ == "__main__":
    main()
