"""Time and memory of the quick start, as a user types it (after `make setup`):

    .venv/bin/python benchmarks/quickstart.py > benchmarks/results/quickstart_HARDWARE_YYYYMM.md

Types `make pretrain` and `make finetune` with new run directories and new shards, watches the whole process tree, and
prints a Markdown page with the raw output; the confusion picture goes to /tmp/quickstart-confusion.png. Memory is the
proportional set size (PSS) summed over all processes of the tree, sampled four times a second: shared pages count once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    print("# Quick start\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'webdataset', 'numpy')}")
    with tempfile.TemporaryDirectory() as folder:
        shards = f"data.shards_dir={folder}/shards"
        measure("pretrain", f"--run-dir {folder}/run {shards}", folder)
        measure("finetune", f"--run-dir {folder}/finetune {shards} init_from={folder}/run", folder)
        for path in sorted(Path(folder, "finetune", "panels").glob("*-validation.png")):
            shutil.copy(path, Path(tempfile.gettempdir()) / "quickstart-confusion.png")  # the last one stays


def measure(target: str, words: str, folder: str) -> None:
    """Type one command and print what it took."""
    command = ["make", target, f"ARGS={words}"]
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
    print(f"\n## make {target}\n")
    print(f"- command: `{' '.join(command).replace(folder, 'FOLDER')}` (exit code {code})")
    print(f"- first training step after {first_step:.1f} s")
    print(f"- all of it after {total:.1f} s")
    print(f"- peak memory of all processes together: {peak / 2**30:.2f} GiB\n")
    print("```\n" + "".join(lines).replace(folder, "FOLDER").strip() + "\n```", flush=True)


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
        while not self._done.wait(2):  # to look costs the watched processes time
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
