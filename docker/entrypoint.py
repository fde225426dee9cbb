"""The first process of a container: runs the command that it is given, so that a stop ends in a saved checkpoint.

A container ends with its first process, and whatever still runs is killed. DeepSpeed's runner dies of a SIGTERM at
once, and with it would go the ranks that were about to save. So this process hands SIGTERM, SIGUSR1 and SIGINT to the
ranks themselves (or to the command where there are none), waits until every process of the container has ended, and
ends with the command's exit code: 85 after a stop, see docs/exit-codes.md.

Where it isn't the first process (Apptainer, `docker run --init`, a shell), it becomes the command.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

#: An exit code of shells: no such command.
NOT_FOUND = 127


def ranks() -> list[int]:
    """Process ids of a launcher's ranks: those that were started with RANK in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        if any(variable.startswith(b"RANK=") for variable in environment):
            found.append(int(folder.name))
    return found


def run_as_first_process(command: list[str]) -> int:
    """The command's exit code, after the last process of the container has ended."""
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return  # the terminal has sent it to everybody
        for pid in ranks() or ([child.pid] if child else []):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, hand_on)
    try:
        child = subprocess.Popen(command)  # noqa: S603
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND
    code = 0
    while True:
        try:
            pid, status = os.wait()  # orphans are this process's children too
        except ChildProcessError:
            return code
        if pid == child.pid:
            ended = os.waitstatus_to_exitcode(status)
            code = 128 - ended if ended < 0 else ended


if __name__ == "__main__":
    if os.getpid() == 1:
        sys.exit(run_as_first_process(sys.argv[1:]))
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606
