"""Each reason to stop is seen at the next look, and the first one stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinv2_scale.engine.preemption import STOP_SIGNALS, StopRequest, end_of_slurm_job
from swinv2_scale.launchers.processes import read


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started with
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_reason_and_the_first_one_stays(number: signal.Signals) -> None:
    request = StopRequest()
    assert not request.is_made
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request.reason == number.name


def test_who_started_a_job_with_nohup_may_close_the_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not request.is_made


def test_the_end_of_the_launcher_is_a_reason() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        launcher = read(child.pid)
        assert launcher is not None
        request = StopRequest([launcher])
        assert not request.is_made
    assert request.reason == f"the launcher's {launcher} has ended"


def test_a_file_is_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    file.touch()
    assert StopRequest(file=file).reason == f"{file} is there"
    assert not StopRequest(file=tmp_path / "other").is_made


def test_time_is_up_the_grace_and_the_longest_step_before_the_end() -> None:
    request = StopRequest(end_time=time.time() + 103, grace_s=100)
    assert not request.is_made
    time.sleep(1.7)  # a step so long: 1.3 s are left before the grace, and the next one may take 1.7
    assert (request.reason or "").startswith("the job's time ends at")
    assert not StopRequest(end_time=time.time() + 1e9, grace_s=100).is_made


@pytest.mark.parametrize(("text", "end"), [("1795415467", 1795415467.0), ("", None), ("Unknown", None)])
def test_slurms_end_is_a_number_or_nothing(monkeypatch: pytest.MonkeyPatch, text: str, end: float | None) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    assert end_of_slurm_job() == end
