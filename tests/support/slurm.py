"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd as children of the tests, on loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
#: No wait of a test takes longer on two busy cores; a hang fails instead of stopping CI.
DEADLINE_S = 120

#: cred_expire: a requeued job waits as long as its old credential lives, two minutes by default. A preempted job has
#: GraceTime to end by itself; what is cancelled has KillWait. ``low`` is preempted by ``high``.
_CONF = """
ClusterName=scratch
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def is_installed() -> bool:
    return all(shutil.which(name) or Path("/usr/sbin", name).exists() for name in PROGRAMS)


@dataclass
class Slurm:
    """The running daemons, and what tests ask of them.

    Attributes:
        environment: with which Slurm's commands find them.
    """

    root: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """What a command printed; it has to succeed."""
        done = self.try_to(*command, cwd=cwd)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def try_to(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        return subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )

    def job(self, number: str) -> dict[str, str]:
        """``JobState``, ``Restarts``, ``ExitCode``, .. as ``scontrol show job`` says them."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, restarts: int | None = None) -> dict[str, str]:
        """Until a job is in one of these states, with so many restarts behind it."""
        end = time.monotonic() + DEADLINE_S
        while True:
            found = self.job(number)
            if found["JobState"] in states and restarts in (None, int(found["Restarts"])):
                return found
            assert time.monotonic() < end, f"job {number} is {found['JobState']}, not {states}: {found}{self.logs()}"
            time.sleep(0.2)

    def clear(self) -> None:
        """Cancel all jobs, wait for their ends, and give every node back."""
        self.try_to("scancel", "--user", "root")
        end = time.monotonic() + 40
        while self.try_to("squeue", "--noheader").stdout and time.monotonic() < end:
            time.sleep(0.2)
        self.try_to("scontrol", "update", "NodeName=n[1-2]", "State=RESUME")

    def logs(self) -> str:
        texts = [f"\n== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.root.glob("*.log")]
        return "".join(texts)


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start it; ends every daemon, and every process of the jobs that are still there."""
    with ExitStack() as stack:
        # munged wants its folder to be safe from other users; a Unix socket's name must be short.
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        root.chmod(0o755)
        conf = root / "slurm.conf"
        path = f"{os.environ['PATH']}:/usr/sbin"
        it = Slurm(root, {**_without_a_job(), "SLURM_CONF": str(conf), "PATH": path})
        _write_files(root, conf)
        stack.callback(_end, it)
        munged = ("munged", "--foreground", "--force", f"--socket={root}/munge.sock", f"--key-file={root}/munge.key")
        more = (f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed")
        _start(it, "munged", *munged, *more)
        _until(it, (root / "munge.sock").exists, "munged's socket")
        _start(it, "slurmctld", "slurmctld", "-D", "-f", conf)
        for node in ("n1", "n2"):
            # Tasks find rank 0 by its node's name, as on a cluster: these daemons have an /etc/hosts of their own.
            own_hosts = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
            command = ("sh", "-c", own_hosts, "sh", root / "hosts", "slurmd", "-D", "-f", conf, "-N", node)
            _start(it, f"slurmd-{node}", "unshare", "--mount", *command)

        def is_idle() -> bool:
            return it.try_to("sinfo", "--noheader", "--format", "%T %D", "--partition", "low").stdout == "idle 2\n"

        _until(it, is_idle, "two idle nodes")
        yield it


def _without_a_job() -> dict[str, str]:
    starts = ("SLURM", "SBATCH", "SRUN")
    return {name: value for name, value in os.environ.items() if not name.startswith(starts)}


def _write_files(root: Path, conf: Path) -> None:
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for name in ("state", "spool-n1", "spool-n2"):
        (root / name).mkdir()
    (root / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} n1 n2\n")
    (root / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/zero\n")
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    conf.write_text(_CONF.format(root=root, host=socket.gethostname(), ports=ports))


def _start(it: Slurm, name: str, *command: object) -> None:
    with (it.root / f"{name}.out.log").open("wb") as log:
        words = list(map(str, command))
        it.daemons.append(subprocess.Popen(words, env=it.environment, stdout=log, stderr=log, start_new_session=True))


def _until(it: Slurm, is_there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not is_there():
        ended = [daemon.args for daemon in it.daemons if daemon.poll() is not None]
        assert time.monotonic() < end, f"no {what}{it.logs()}"
        assert ended == [], it.logs()
        time.sleep(0.1)


def _end(it: Slurm) -> None:
    it.clear()
    for daemon in reversed(it.daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
