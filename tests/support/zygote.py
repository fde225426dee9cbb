"""A process that has imported everything and forks the ranks of jobs: five CPU seconds less for each of a hundred.

Run as a script it reads one JSON line for each rank to start, and prints ``started PID`` and ``ended PID CODE``. A rank
is an ordinary process from there on: its own environment, output, signals, children, and a whole interpreter shutdown.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import sys
from pathlib import Path


def main() -> None:
    sys.modules["triton"] = None  # type: ignore[assignment]  # no rank uses it; where frozen it complains at the exit
    import torch._dynamo  # noqa: F401  (optimizers import it when the first one is made)

    import swinv2_scale.cli.train
    import swinv2_scale.engine.job  # noqa: F401

    # Only the thread that forks lives on in the child.
    assert len(os.listdir("/proc/self/task")) == 1, "an import started a thread"
    # Else each collector goes through all imports and copies their pages: 1.2 of a short rank's 2.5 CPU seconds.
    gc.collect()
    gc.freeze()
    say("ready")
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            received = os.read(0, 65536)
            if not received:
                return  # the tests are over
            pending += received
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            pid = os.fork()
            if pid == 0:
                become_rank(**json.loads(line))
                return
            say(f"started {pid}")
        for pid, code in ended_children():
            say(f"ended {pid} {code}")


def become_rank(command: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """What exec would have done: environment, folder, files, and then the script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_APPEND)):
        handle = os.open(path, flags)
        os.dup2(handle, number)
        os.close(handle)
    os.dup2(1, 2)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def ended_children() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, os.waitstatus_to_exitcode(status)))


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main()
