"""The first process of a container: a stop reaches the ranks, and the container lasts until they have saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ENTRYPOINT = Path(__file__).parents[2] / "docker" / "entrypoint.py"
#: As long as the processes may take on two busy cores.
DEADLINE_S = 60

RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(1)
    (folder / f"saved-{os.environ['RANK']}").touch()
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
(folder / f"runs-{os.environ['RANK']}").touch()
time.sleep(60)
"""
#: Dies of SIGTERM without a word to its ranks, as DeepSpeed's runner does; else it ends with their code.
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(r)}) for r in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


class Container:
    """Processes with numbers of their own, of which the entry point is number 1."""

    def __init__(self, *command: str) -> None:
        own_numbers = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen([*own_numbers, sys.executable, str(ENTRYPOINT), *command])

    def first(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def code(self) -> int:
        return self.process.wait(DEADLINE_S)


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"not all of {paths} came to be"
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path / "rank.py"), str(tmp_path)]


@pytest.mark.system
def test_a_stopped_container_ends_when_all_ranks_have_saved_with_their_code(job: list[str], tmp_path: Path) -> None:
    container = Container(*job)
    wait_for(tmp_path / "runs-0", tmp_path / "runs-1")
    container.first().send_signal(signal.SIGTERM)
    assert container.code() == 85
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.system
def test_ranks_whose_launcher_has_died_may_save_before_the_container_ends(job: list[str], tmp_path: Path) -> None:
    container = Container(*job)
    wait_for(tmp_path / "runs-0", tmp_path / "runs-1")
    launcher = container.first().children()[0]
    ranks = launcher.children()
    launcher.terminate()
    for rank in ranks:  # what they notice by themselves, engine/preemption.py
        rank.terminate()
    assert container.code() == 128 + signal.SIGTERM
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.system
def test_a_command_without_ranks_gets_the_signal_itself(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    container = Container(sys.executable, "-c", code, str(tmp_path / "runs"))
    wait_for(tmp_path / "runs")
    container.first().send_signal(signal.SIGTERM)
    assert container.code() == 128 + signal.SIGTERM


def test_elsewhere_it_becomes_the_command() -> None:
    command = [sys.executable, str(ENTRYPOINT), sys.executable, "-c", "import os, sys; sys.exit(os.getppid() % 100)"]
    parents = subprocess.Popen(command)
    assert parents.wait(DEADLINE_S) == psutil.Process().pid % 100


@pytest.mark.system
def test_a_command_that_does_not_exist_is_said_so() -> None:
    assert Container("no-such-command").code() == 127
