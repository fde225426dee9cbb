"""All checks of the doctor, in every process of a job, within a minute whatever hangs."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.engine.doctor import compiled, findings, group, host, shards, storage
from swinv2_scale.engine.doctor.findings import Finding, Process, State, of_error, problem
from swinv2_scale.errors import ConfigError, ExitCode, ScaleError, printable

#: From the first check to the verdict; imports come before.
DEADLINE_S = 55
#: For the processes to find each other, and for each exchange between them after that.
_JOIN_S = 25
_LOCAL_S = 12
#: Of the table; what isn't here comes last.
_ORDER = (
    *("processes", "group", "versions", "code", "configuration", "accelerator", "training data", "validation data"),
    *("memory", host.SHARED_MEMORY, storage.FREE, storage.SWAP, storage.SHARED, "ulimit -n", "compiled operators"),
    *("clocks", "network", "network settings", "address of rank 0"),
)
_SAME_FILES = "make every node see the same files and the same environment"
_WHERE_DIFFERENT = {
    "versions": "use one environment or one container image on all nodes",
    "code": "update the package on every node, or install it on a shared disk",
    "configuration": "give every node the same file and the same command line",
    "accelerator": "ask for nodes of one kind: the slowest sets the pace",
    "training data": _SAME_FILES,
    "validation data": _SAME_FILES,
    "network settings": "set them in one place for all ranks: the job script, or .deepspeed_env",
}


@dataclass(frozen=True)
class Verdict:
    """What all processes found, one finding a check."""

    findings: tuple[Finding, ...]
    num_processes: int
    seconds: float

    def count(self, state: State) -> int:
        return sum(finding.state is state for finding in self.findings)

    @property
    def is_ready(self) -> bool:
        return not self.count(State.PROBLEM)


class Examination:
    """One process's part in it. A rank that fails or hangs is a finding; the others don't wait for it for long.

    A process that something hangs in ends inside ``run``, with 78 or what was agreed on.

    Args:
        loaded: the configuration, why it isn't valid, or None for what can be said without one.
        run_dir: where the job would write; None: nothing is looked at.
        show: is given the verdict, in rank 0 alone.
    """

    def __init__(
        self, loaded: LoadedConfig | ConfigError | None, run_dir: Path | None, show: Callable[[Verdict], None]
    ) -> None:
        self._loaded = loaded if isinstance(loaded, LoadedConfig) else None
        self._refused = loaded if isinstance(loaded, ConfigError) else None
        self._run_dir, self._show = run_dir, show
        self._begun = time.monotonic()
        self._found: list[Finding] = []
        self._doing = "looking at its own node"
        self._is_stuck = False  # threads or collectives that never return: only os._exit gets out

    def run(self) -> ExitCode:
        """0 or 78, the same in every process."""
        timer = threading.Timer(DEADLINE_S, self._give_up)
        timer.daemon = True
        timer.start()
        mine = self._examine_process()
        self._found = findings.rows([mine], {})
        try:
            is_ready = self._examine_group(mine)
        except (ScaleError, RuntimeError) as error:
            timer.cancel()
            self._end_alone(f"rank {dist.rank()} failed while {self._doing}: {error}")
        timer.cancel()
        if dist.rank() == 0:
            self._show(self._verdict())
        code = ExitCode.DONE if is_ready else ExitCode.BAD_CONFIG
        if self._is_stuck:
            _leave(code)
        dist.stop()
        return code

    def _examine_process(self) -> Process:
        found = findings.answers(self._checks(), _LOCAL_S)
        self._is_stuck = any(isinstance(result, TimeoutError) for result in found.values())
        mine = []
        for check, result in found.items():
            mine += [of_error(check, result)] if isinstance(result, Exception) else result
        if self._refused:
            mine.append(problem("configuration", self._refused.message, self._refused.next_step))
        return Process(dist.rank(), dist.local_rank(), socket.gethostname(), tuple(mine))

    def _checks(self) -> dict[str, Callable[[], list[Finding]]]:
        """Those of this process, some for its node or the whole job."""
        loaded, run_dir = self._loaded, self._run_dir
        config = loaded.config if loaded else None
        checks: dict[str, Callable[[], list[Finding]]] = {
            "versions": lambda: host.look_at_software(loaded),
            "accelerator": lambda: host.look_at_accelerator(config),
            "ulimit -n": host.look_at_limits,
            "network settings": host.look_at_network,
        }
        if dist.local_rank() == 0:
            checks["memory"] = lambda: host.look_at_memory(config)
            checks["compiled operators"] = lambda: compiled.look_at_operators(config)
            if config:
                checks["training data"] = lambda: shards.look_at_shards(config)
            if config and config.engine.offload.uses_nvme:
                checks[storage.SWAP] = lambda: [Finding(storage.SWAP, storage.check_swap_space(config))]
        if dist.rank() == 0:
            checks["processes"] = lambda: host.look_at_cluster(config)
            if run_dir:
                checks[storage.FREE] = lambda: storage.look_at_disk(config, run_dir)
        return checks

    def _examine_group(self, mine: Process) -> bool:
        """Whether all is well, the same answer in every process.

        Raises:
            ScaleError, RuntimeError: the others are not there, or no longer.
        """
        self._doing = "joining the other processes"
        # NCCL's own watchdog would abort the process; the deadline here says what hung.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        dist.start(_JOIN_S)
        self._doing = "telling the others what it found"
        processes = dist.gather(mine)
        self._found = findings.rows(processes, _WHERE_DIFFERENT)
        if self._run_dir:
            self._doing = "looking for rank 0's file in the run directory"
            self._found.append(storage.look_at_shared_folder(self._run_dir))
        if dist.world_size() > 1:
            self._doing = "comparing the clocks"
            self._found.append(group.look_at_clocks(processes))
            self._doing = "measuring the network"
            self._found.append(group.measure_network())
        else:
            self._found.append(Finding("network", "one process: nothing to compare, nothing to measure"))
        self._doing = "agreeing on a verdict"
        return dist.broadcast(self._verdict().is_ready)

    def _verdict(self) -> Verdict:
        ordered = sorted(self._found, key=lambda finding: _ORDER.index(finding.check))
        return Verdict(tuple(ordered), dist.world_size(), time.monotonic() - self._begun)

    def _give_up(self) -> None:
        self._end_alone(f"rank {dist.rank()} is still {self._doing} after {DEADLINE_S} s")

    def _end_alone(self, why: str) -> NoReturn:
        """Without the others: rank 0 shows what is known, the others say in a line what kept them."""
        if dist.rank() == 0:
            advice = "see what the other processes say; firewall, interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
            self._found.append(problem("group", why, advice))
            self._show(self._verdict())
        else:
            print(printable(f"doctor on {socket.gethostname()}: {why}"), file=sys.stderr)
        _leave(ExitCode.BAD_CONFIG)


def _leave(code: ExitCode) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))
