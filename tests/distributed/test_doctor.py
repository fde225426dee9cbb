"""``swinv2-scale doctor`` in two real processes: what is well, what differs, and who never answers."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, Job, start
from tests.support.small_run import write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

WORKER = REPOSITORY / "tests" / "distributed" / "workers" / "doctor.py"
FAULTS = ("none", "another configuration", "never comes", "stops after joining", "a store that never answers")
#: The command's own promise, with its waits shortened; the rest is a busy machine's.
DEADLINE_S = 60


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, tuple[list[int | None], str]]:
    """Exit codes (None for a rank that was stopped) and rank 0's output, by fault; all at once: most of it is waiting.

    The run directory is looked at here: nothing may be left of it.
    """
    root = tmp_path_factory.mktemp("doctor")
    config = write_config(root, shards)
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and never says a word
    jobs: dict[str, Job] = {}
    for fault in FAULTS:
        words = [f"data.train=http://127.0.0.1:{silent.getsockname()[1]}/0.tar"] if "store" in fault else []
        run = root / fault / "run"
        jobs[fault] = start(WORKER, fault, config, *words, "--run-dir", run, "--json", processes=2)
    found = {}
    try:
        end = time.monotonic() + DEADLINE_S
        for fault, job in jobs.items():
            survivors = job.ranks[:1] if fault in ("never comes", "stops after joining") else job.ranks
            while any(rank.poll() is None for rank in survivors):
                assert time.monotonic() < end, f"{fault}:\n" + "\n".join(rank.output for rank in job.ranks)
                time.sleep(0.05)
            found[fault] = ([rank.poll() for rank in job.ranks], job.ranks[0].output)
            assert not (root / fault).exists(), "the run directory was left behind"
    finally:
        for job in jobs.values():
            for rank in job.ranks:
                rank.send_signal(signal.SIGKILL)
    return found


def checks(output: str) -> dict[str, dict[str, str]]:
    verdict = json.loads(output[output.index("{") :])
    return {check["check"]: check for check in verdict["checks"]}


def test_where_all_is_well_both_ranks_say_so_and_leave_nothing(ended) -> None:
    codes, output = ended["none"]
    assert codes == [0, 0], output
    found = checks(output)
    assert {check["state"] for check in found.values()} == {"ok"}
    assert "2 processes on 1 node" in found["processes"]["found"]
    assert "every node sees its files and locks" in found["run directory"]["found"]
    assert "8,000 samples in 8 shards" in found["training data"]["found"]
    assert "bus bandwidth" in found["network"]["found"]


def test_a_rank_with_another_configuration_and_environment_is_named_with_the_key(ended) -> None:
    codes, output = ended["another configuration"]
    assert codes == [78, 78]
    found = checks(output)
    assert found["configuration"]["state"] == "problem"
    assert "optim.lr is 0.5 on rank 1 on " in found["configuration"]["found"]
    assert "NCCL_DEBUG is " in found["network settings"]["found"]
    assert found["versions"]["state"] == found["code"]["state"] == "ok"


def test_a_rank_that_never_comes_ends_the_others_in_time(ended) -> None:
    codes, output = ended["never comes"]
    assert codes == [78, None]
    found = checks(output)
    assert "rank 0 failed while joining the other processes" in found["group"]["found"]
    assert found["training data"]["state"] == "ok", "its own checks are shown all the same"


def test_a_rank_that_stops_after_joining_ends_the_others_in_time(ended) -> None:
    codes, output = ended["stops after joining"]
    assert codes == [78, None]
    assert "rank 0 failed while telling the others what it found" in checks(output)["group"]["found"]


def test_a_store_that_never_answers_is_a_finding(ended) -> None:
    codes, output = ended["a store that never answers"]
    assert codes == [78, 78]
    found = checks(output)
    assert found["training data"]["found"] == "no answer within 3 s"
    assert found["network"]["state"] == "ok", "the other checks go on"
