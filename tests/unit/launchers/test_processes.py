"""The launcher's processes, found in /proc: real ones, with the names of real ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swinv2_scale.launchers.processes import Process, hostfile_of, launcher_of, read

#: Starts its own last argument's worth of generations below itself, prints the youngest's id, and waits.
CHAIN = """
import subprocess, sys
command = sys.argv[1:]
child = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE) if command else None
if child is None:
    import os
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def chain(folder: Path, *names: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Python processes under python processes, each a script with the next name: the first one, and the last's id."""
    scripts = [folder / name for name in names]
    for script in scripts:
        script.write_text(CHAIN)
    command = [sys.executable, *map(str, scripts)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        yield first, int(first.stdout.readline())


def test_the_launcher_goes_from_the_rank_to_the_outermost_that_is_one(tmp_path: Path) -> None:
    with chain(tmp_path, "sh.py", "deepspeed", "torchrun", "wrapper.py", "rank.py") as (_, rank):
        assert [process.name for process in launcher_of(rank)][1:] == ["torchrun", "deepspeed"]


def test_without_a_launcher_there_is_nobody_to_watch(tmp_path: Path) -> None:
    with chain(tmp_path, "make.py", "rank.py") as (_, rank):
        assert launcher_of(rank) == []


def test_a_launcher_that_ends_is_seen_even_before_its_parent_has_waited_for_it(tmp_path: Path) -> None:
    with chain(tmp_path, "torchrun", "rank.py") as (first, rank):
        (launcher,) = launcher_of(rank)
        assert launcher.pid == first.pid
        assert launcher.is_alive
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # still a zombie
        assert not launcher.is_alive


def test_another_process_with_the_same_number_is_not_taken_for_it() -> None:
    me = read(os.getpid())
    assert me is not None
    assert me.is_alive
    assert not Process(me.pid, me.parent, me.started - 1, me.command).is_alive


@pytest.mark.parametrize("words", [["--hostfile", "hosts"], ["--hostfile=hosts"], ["-H", "hosts"]])
def test_the_hostfile_is_the_runners_own_seen_from_where_it_was_started(tmp_path: Path, words: list[str]) -> None:
    me = read(os.getpid())
    assert me is not None
    runner = Process(me.pid, me.parent, me.started, ("python", "/bin/deepspeed", *words, "launch/pretrain.py"))
    assert hostfile_of([runner]) == Path.cwd() / "hosts"
    torchrun = Process(me.pid, me.parent, me.started, ("python", "/bin/torchrun", *words))
    assert hostfile_of([torchrun]) is None
