"""A child whose fork hung is replaced by one that runs, and nothing else is different."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from swinv2_scale.data import forks

#: Batches with one worker, whose first fork or forks hang where Python's own lock lets them hang: before any Python of
#: the child's. Prints the children that were made, and the ids of the samples.
HUNG_FORKS = """
import os, sys, time
import numpy
from swinv2_scale.data import forks
from swinv2_scale.data.loader import PositionDataset, Share, training_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
pattern, hanging = sys.argv[1], int(sys.argv[2])
if hanging:
    forks._PATIENCE_S = 1.0  # the one that runs has 4 s, or the 5 s that it always has
pids, fork = [], os.fork
def recorded():
    pid = fork()
    pids.append(pid)
    return pid
os.fork = recorded
os.register_at_fork(after_in_child=lambda: len(pids) < hanging and time.sleep(1000))
shards = read_shard_set(pattern)
order = Order.of(shards.sizes, 0, True, 4)
dataset = PositionDataset(ShardReader(shards), order, lambda record, draw: {"a": numpy.zeros(1)}, False)
batches = training_batches(dataset, Share(4, 2, 0, 1, 1, 1, 999, 8), 0, 3)
keys = [key for batch in batches for key in batch.keys]
batches.close()
for pid in pids[:hanging]:
    try:
        os.kill(pid, 0)
        print("alive:", pid)
    except ProcessLookupError:
        pass
print(len(pids), *keys)
"""


@pytest.fixture
def pattern(shards: Path) -> str:
    return str(shards / "fashion-mnist" / "validation" / "*.tar")


def batches_with(hanging: int, pattern: str) -> tuple[list[str], str]:
    command = [sys.executable, "-c", HUNG_FORKS, pattern, str(hanging)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split(), ended.stderr


def test_f28_workers_whose_forks_hung_are_ended_and_forked_again(pattern: str) -> None:
    (children, *keys), said = batches_with(2, pattern)
    assert children == "3"
    assert said.count("a worker process did not begin to run within") == 2, said
    assert said.index("within 1 s") < said.index("within 2 s")
    (alone, *undisturbed), silence = batches_with(0, pattern)
    assert alone == "1"
    assert not silence
    assert keys == undisturbed
    assert len(keys) == 12


@pytest.mark.parametrize("left", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_f28_a_child_whose_parent_died_or_gave_it_up_does_nothing(left: int) -> None:
    ran: list[int] = []
    process = forks.Context().Process(target=ran.append, args=(1,))
    here, there = socket.socketpair()
    process.line = here.dup(), there
    here.shutdown(left)
    process.run()
    assert not ran


def test_a_child_that_dies_at_once_is_its_users_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks.Process, "run", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    process = forks.Context().Process(target=print)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
