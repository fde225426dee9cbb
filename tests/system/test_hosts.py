"""Two hosts, each with its own network, name and sshd: `deepspeed --hostfile` over pdsh, and what can happen to it.

Needs root, iproute2, pdsh and an ssh server: `make test-system` installs and runs it.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import launchers
from tests.support.hosts import Host, environment_file, reachable_by_ssh, two_hosts
from tests.support.kills import newest_step
from tests.support.launchers import Launched, deepspeed, pretrain, torchrun
from tests.support.processes import DEADLINE_S
from tests.support.small_run import LIGHT, metrics, write_config

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
MISSING = [name for name in ("ip", "pdsh", "sshd", "ssh-keygen") if not shutil.which(name, path=PATH)]
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SETTINGS = (*LIGHT, "evaluation.every_steps=0", "cluster.num_nodes=2", "logging.console_every_steps=1000")
NO_CHECKPOINTS, ENDLESS = "checkpoint.every_steps=1000", "optim.total_steps=100000"
STEP_TIMEOUT_S = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts, reachable_by_ssh(hosts, tmp_path / "ssh"):
        yield hosts


def start(hosts: Sequence[Host], folder: Path, config: Path, *arguments: object) -> Launched:
    """DeepSpeed's runner on the first host, one rank on each."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    run = folder / "run"
    command = [*deepspeed("--hostfile", hostfile), *pretrain(config, run, *SETTINGS, *arguments)]
    return launchers.start(hosts[0].command(*command), run, DS_ENV_FILE=str(environment_file(folder)))


def test_two_hosts_over_pdsh_train_as_two_processes_of_one_and_outlive_signals_to_the_runner(
    tmp_path: Path, config: Path, hosts: tuple[Host, Host]
) -> None:
    run, training = tmp_path / "run", (NO_CHECKPOINTS, ENDLESS)
    for hit in (signal.SIGUSR1, signal.SIGTERM):
        before = len(metrics(run)) if run.exists() else 0
        job = start(hosts, tmp_path, config, *training)
        job.wait_for_step(before + 3)
        os.kill(job.process.pid, hit)
        job.wait()
        assert newest_step(run) == len(metrics(run)), job.output
    last = newest_step(run) + 2
    job = start(hosts, tmp_path, config, "--steps", last, *training)
    assert job.wait() == 0, job.output
    alone = tmp_path / "alone"
    one_node = [*SETTINGS, *training, "cluster.num_nodes=1", "--steps", last]
    job = launchers.start([*torchrun("--nproc-per-node", 2), *pretrain(config, alone, *one_node)], alone)
    assert job.wait() == 0, job.output
    assert metrics(run) == metrics(alone)


def test_a_hostfile_with_one_host_less_stops_the_job(tmp_path: Path, config: Path, hosts: tuple[Host, Host]) -> None:
    job = start((hosts[0],), tmp_path, config)
    assert job.wait() == 78, job.output
    assert "cluster.num_nodes is 2, the launcher started processes on 1" in job.output


def test_f19_a_cut_between_hosts_ends_both_halves_in_time_and_leaves_no_process(
    tmp_path: Path, config: Path, hosts: tuple[Host, Host]
) -> None:
    limit = f"cluster.step_timeout_s={STEP_TIMEOUT_S}"
    job = start(hosts, tmp_path, config, "checkpoint.every_steps=5", ENDLESS, limit)
    job.wait_for_step(12)
    hosts[1].cut_wire()
    # Both ranks end by themselves; the ssh between the hosts can only end when it is told of it.
    end = time.monotonic() + DEADLINE_S
    while any("pretrain.py --local_rank" in command for _, command in job.members()):
        assert time.monotonic() < end, job.output
        time.sleep(0.1)
    hosts[1].mend_wire()
    job.wait()
    run = tmp_path / "run"
    for rank in range(2):
        log = (run / "log" / f"rank-{rank}.log").read_text()
        assert re.search(rf"rank {1 - rank} on {hosts[1 - rank].name} no longer answers", log), log[-3000:]
    published = newest_step(run)
    assert published <= len(metrics(run)) < published + 10
    again = start(hosts, tmp_path, config, "checkpoint.every_steps=5", ENDLESS, "--steps", published + 2)
    assert again.wait() == 0, again.output
    assert f"step-{published:08d}" in again.output
