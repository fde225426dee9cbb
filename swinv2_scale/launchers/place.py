"""Who started this process, and as which of how many: DeepSpeed's launcher, torchrun, srun, or nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from swinv2_scale.errors import ClusterError

Launcher = Literal["deepspeed", "torchrun", "srun", "environment", "none"]

_ADVICE = "start with `deepspeed launch/...`, torchrun or srun; for one plain process unset RANK and WORLD_SIZE"


@dataclass(frozen=True)
class Place:
    """One process among those of its job.

    Attributes:
        launcher: ``environment`` is another one that sets torch's variables; ``none`` is plain python.
        local_rank: number on its node.
        address, port: where rank 0 listens; empty and 0 for a single process.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_nodes: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The environment that torch and DeepSpeed read, named as torchrun names it."""
        found: dict[str, object] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_WORLD_SIZE": self.num_nodes,
        }
        if self.address:
            found |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in found.items()}


def adopt() -> Place:
    """Find this process's place and put it into its environment, whichever launcher it came from.

    Raises:
        ClusterError: what the launcher says is incomplete or contradicts itself.
    """
    place = find(os.environ)
    os.environ.update(place.variables())
    return place


def find(environ: Mapping[str, str]) -> Place:
    """The place that an environment describes.

    torch's variables win over Slurm's: torchrun and DeepSpeed are themselves started by srun at many sites.

    Raises:
        ClusterError: see ``adopt``.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        place = _from_torch(environ)
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        place = _from_srun(environ)
    else:
        _refuse_lone_process(environ)
        place = Place("none", 0, 1, 0, 1, 1, "", 0)
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size):
        raise ClusterError(
            f"the launcher says rank {place.rank} of {place.world_size}, {place.local_rank} of "
            f"{place.local_world_size} on its node",
            _ADVICE,
        )
    if place.world_size > 1 and not (place.address and place.port):
        raise ClusterError(f"WORLD_SIZE is {place.world_size} but MASTER_ADDR or MASTER_PORT is not set", _ADVICE)
    return place


def _from_torch(environ: Mapping[str, str]) -> Place:
    launcher: Launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environ:
        launcher = "deepspeed"
    elif environ.get("SLURM_STEP_NUM_TASKS") == environ.get("WORLD_SIZE"):
        launcher = "srun"  # adopted before
    world_size = _number(environ, "WORLD_SIZE")
    # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environ.get(name)), "WORLD_SIZE")
    local_world_size = _number(environ, local)
    nodes = next((name for name in ("GROUP_WORLD_SIZE", "CROSS_SIZE") if environ.get(name)), None)
    return Place(
        launcher=launcher,
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK") if world_size > 1 else 0,
        local_world_size=local_world_size,
        num_nodes=_number(environ, nodes) if nodes else -(-world_size // max(local_world_size, 1)),
        address=environ.get("MASTER_ADDR", ""),
        port=_number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else 0,
    )


def _from_srun(environ: Mapping[str, str]) -> Place:
    """Source: srun(1), "OUTPUT ENVIRONMENT VARIABLES"."""
    world_size, node = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_NODEID")
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if sum(tasks) != world_size or node >= len(tasks):
        raise ClusterError(
            f"srun says {world_size} tasks, SLURM_STEP_TASKS_PER_NODE {environ.get('SLURM_STEP_TASKS_PER_NODE')!r}",
            "start the script as the srun step itself",
        )
    # Two steps of a job, or two jobs on a node, must not meet. Below 32768 the kernel gives no port to connections.
    port = 20_000 + (_number(environ, "SLURM_JOB_ID") * 16 + _number(environ, "SLURM_STEP_ID")) % 12_000
    return Place(
        launcher="srun",
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        num_nodes=len(tasks),
        address=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "")),
        port=_number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
    )


def _refuse_lone_process(environ: Mapping[str, str]) -> None:
    """Many processes that each take themselves for the only one, or one that has the place of many."""
    for name, start in (("SLURM_NTASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "srun, torchrun or deepspeed")):
        if environ.get(name, "1") != "1":
            raise ClusterError(
                f"{name} is {environ[name]}, but nothing says which of them this process is",
                f"start it with {start}; for one plain process unset {name}",
            )


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: ``gpu[07-09,12],cpu1`` -> ``gpu07``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first.group()) if first else ""


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` -> [2, 2, 2, 1]."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        return []
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None or not re.fullmatch(r"\d{1,9}", text):
        found = "not set" if text is None else f"{text!r}, not a number"
        raise ClusterError(f"the launcher's environment is incomplete: {name} is {found}", _ADVICE)
    return int(text)
