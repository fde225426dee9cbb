"""What this process and its node have: versions, accelerator, memory, limits, network settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import socket
from pathlib import Path
from typing import get_args

import torch

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.config.model import AttentionBackend
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine.doctor.findings import Finding, of_error, problem, size, warning
from swinv2_scale.engine.doctor.storage import checkpoint_bytes
from swinv2_scale.engine.job import TASKS, check_cluster
from swinv2_scale.engine.resume import plain, versions
from swinv2_scale.errors import ClusterError, ConfigError
from swinv2_scale.launchers.place import find
from swinv2_scale.launchers.processes import own_launcher
from swinv2_scale.models.ops.attend import resolve
from swinv2_scale.models.tiles import tiling
from swinv2_scale.plan import zero
from swinv2_scale.plan.batch import accumulation_steps

SHARED_MEMORY = "/dev/shm"  # noqa: S108  where torch puts what loader workers hand over
#: Open shard files, and what Python, torch and the log need.
_FILES_EACH = 128 + 128
#: To rank 0's store from every process: the group's and the board's; and to each other where gloo is the network.
_SOCKETS_EACH = 3
#: Of the network libraries; what they hold is printed.
_NETWORK = re.compile(r"NCCL_.*|RCCL_.*|GLOO_.*|TORCH_NCCL_.*|FI_.*|UCX_.*|.*_IFNAME|HSA_FORCE_.*|CUDA_DEVICE_MAX_.*")


def look_at_software(loaded: LoadedConfig | None) -> list[Finding]:
    """Versions, every module of the package and every key of the configuration; what is compared between processes."""
    found = versions()
    revision = found["git"] or "no checkout"
    texts = [f"{name} {version}" for name, version in found.items() if name != "git"]
    findings = [Finding("versions", ", ".join(texts), facts={**found, "git": revision})]
    root = Path(__file__).parents[2]
    digests = {str(path.relative_to(root)): _digest(path.read_bytes()) for path in sorted(root.rglob("*.py"))}
    text = f"{len(digests)} modules, {_digest(json.dumps(digests).encode())}, git {revision}"
    findings.append(Finding("code", text, facts=digests))
    if loaded is not None:
        values = {key: json.dumps(value) for key, value in plain(loaded.config).items()}
        text = f"{loaded.path}: valid, {_digest(json.dumps(values).encode())}"
        findings.append(Finding("configuration", text, facts=values))
    return findings


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def network_environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if _NETWORK.fullmatch(name)}


def device_facts() -> dict[str, str]:
    """Of the accelerator, the same on every node of a job that is balanced."""
    if not torch.cuda.is_available():
        return {"device": "CPU"}
    # ROCm's devices are torch.cuda's too.
    version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    memory = torch.cuda.get_device_properties(dist.device()).total_memory / 2**30
    facts = {"device": torch.cuda.get_device_name(dist.device()), "memory": f"{memory:.0f} GiB"}
    return {**facts, "number on a node": str(torch.cuda.device_count()), "made for": version}


def look_at_accelerator(config: RunConfig | None) -> list[Finding]:
    """What there is to compute on, found by using it; of every process."""
    facts = device_facts()
    has_bf16 = _has_bf16()
    name = ", ".join((facts["device"], *(f"{key} {value}" for key, value in facts.items() if key != "device")))
    backends = _attention_backends()
    flash = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    text = f"{name}; bf16 {'in hardware' if has_bf16 else 'emulated'}; attention: {', '.join(backends) or 'none'}"
    text += f"; torch's flash kernels {'' if flash else 'not '}there" if torch.cuda.is_available() else ""
    if not torch.cuda.is_available() and any(Path("/dev").glob("nvidia[0-9]*")):
        why = "this torch is a CPU build" if torch.version.cuda is None else "driver, CUDA_VISIBLE_DEVICES or container"
        return [problem("accelerator", f"{text}, though there is /dev/nvidia0", f"look at nvidia-smi: {why}")]
    wanted = set(config.model.stage_backends) if config else set()
    if not wanted <= set(backends):
        missing = ", ".join(sorted(wanted - set(backends)))
        return [problem("accelerator", f"{text}; {missing} fails here", "choose another model.attention.backend")]
    if config and config.engine.precision != "fp32" and not has_bf16:
        return [warning("accelerator", text, "engine.precision fp32 is faster here, or take a newer device")]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(dist.device())
        if free < 0.9 * total:
            advice = "look who else uses it: nvidia-smi"
            used = f"{(total - free) / 2**30:.0f} GiB of it are taken already"
            return [warning("accelerator", f"{text}; {used}", advice)]
    return [Finding("accelerator", text, facts=facts)]


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))  # the last is ARM's


def _attention_backends() -> list[str]:
    """Those that give a gradient on this device."""
    device = dist.device()
    usable = []
    tiles = tiling((4, 4), (2, 2), True, device)
    for name in get_args(AttentionBackend):
        qkv = torch.ones(1, 16, 3, 1, 32, device=device, requires_grad=True)
        table = torch.zeros(1, 3, 3, device=device, requires_grad=True)
        try:
            resolve(name, 2**20)(qkv, torch.ones(1, device=device), table, tiles).sum().backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, ConfigError):  # no kernel for it; it isn't built
            continue
        usable.append(name)
    return usable


def look_at_memory(config: RunConfig | None) -> list[Finding]:
    """Memory and shared memory of this node against what its processes will take; by one of them."""
    available = _available_bytes()
    statistics = os.statvfs(SHARED_MEMORY)
    shared = statistics.f_bavail * statistics.f_frsize
    memory = Finding("memory", f"{size(available)} available on a node", amount=available)
    folder = Finding(SHARED_MEMORY, f"{size(shared)} free on a node", amount=shared)
    if config is None:
        return [memory, folder]
    batches = dist.local_world_size() * _loader_bytes(config)
    copies = checkpoint_bytes(config) * dist.local_world_size() // dist.world_size()  # of what a save writes
    held = zero.states(zero.Sharding.of(config, dist.world_size()))
    states = held.host if torch.cuda.is_available() else held.host + held.static + held.gradients
    is_copied = config.checkpoint.asynchronous and config.engine.offload.optimizer_states != "nvme"
    needed = batches + (copies if is_copied else 0) + states * dist.local_world_size()
    text = f"{memory.found}, its processes take about {size(needed)} besides activations"
    findings = [Finding("memory", text, amount=available)]
    if available < needed:
        advice = "lower data.prefetch_bytes, set checkpoint.asynchronous=false, or start fewer processes on a node"
        findings = [warning("memory", text, advice)]
    text = f"{folder.found}, ready batches take up to {size(batches)}"
    if config.data.num_workers and shared < batches:
        advice = "docker run --shm-size, or lower data.prefetch_bytes, data.prefetch_batches or data.num_workers"
        return [*findings, problem(SHARED_MEMORY, text, advice)]
    return [*findings, Finding(SHARED_MEMORY, text, amount=shared)]


def _loader_bytes(config: RunConfig) -> int:
    """Batches that wait in a process and its workers, as data/loader.py plans them."""
    data = config.data
    held = max(data.global_batch_size // (data.micro_batch_size * dist.world_size()), 1)
    waiting = data.num_workers * data.prefetch_batches + held
    sample_bytes: int = TASKS[config.task.name](config).sample_bytes
    return min(data.prefetch_bytes, waiting * data.micro_batch_size * sample_bytes)


def _available_bytes() -> int:
    """Of this node, or of the container or Slurm job, where that has less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::/")[2].strip()
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
            available = min(available, int(text) - int(used.read_text(encoding="utf-8")))
    return max(available, 0)


def look_at_limits() -> list[Finding]:
    """Open files of this process, which for rank 0 grow with the number of ranks; a job raises its own limit first."""
    dist.allow_open_files()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_EACH + _SOCKETS_EACH * dist.world_size()
    text = f"{soft:,} open files a process, about {needed:,} are needed"
    if soft != resource.RLIM_INFINITY and soft < needed:
        return [problem("ulimit -n", text, "raise the hard limit: ulimit -Hn (LimitNOFILE in slurmd's unit)")]
    return [Finding("ulimit -n", text, amount=soft)]


def look_at_network() -> list[Finding]:
    """Where rank 0 is, and which interfaces the libraries are told to take."""
    environment = network_environment()
    text = " ".join(f"{name}={value}" for name, value in environment.items()) or "no NCCL_* or GLOO_* is set"
    findings = [Finding("network settings", text, facts=environment)]
    interfaces = sorted(os.listdir("/sys/class/net"))
    for name in [name for name in environment if name.endswith("_IFNAME")]:
        value = environment[name]
        wanted = [part for part in value.lstrip("=^").split(",") if part]
        exact = value.startswith("=") or name.startswith("GLOO")
        there = [i for i in interfaces if any(i == part if exact else i.startswith(part) for part in wanted)]
        if wanted and not value.startswith("^") and not there:
            found = f"{name}={value}, but this node has {', '.join(interfaces)}"
            findings = [problem("network settings", found, f"set {name} to one of them")]
    address = os.environ.get("MASTER_ADDR")
    if dist.world_size() == 1 or not address:
        return findings
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None)})
    except OSError as error:
        advice = "use an address of rank 0's node that the others know (--master_addr), or repair /etc/hosts or DNS"
        return [*findings, problem("address of rank 0", f"{address} can't be resolved: {error}", advice)]
    same = f"{address}:{os.environ.get('MASTER_PORT')}"
    if dist.rank() >= dist.local_world_size() and all(ip.startswith("127.") or ip == "::1" for ip in addresses):
        advice = "if the processes don't find each other, give the launcher an address that all nodes know"
        return [*findings, warning("address of rank 0", f"{same} is {addresses[0]} here: this node itself", advice)]
    return [*findings, Finding("address of rank 0", f"{same} is known to every node")]


def look_at_cluster(config: RunConfig | None) -> list[Finding]:
    """What the launcher has started, against what was asked for; by rank 0."""
    place = find(os.environ)
    processes, nodes = place.world_size, place.num_nodes
    text = f"{processes} process{'es' * (processes > 1)} on {nodes} node{'s' * (nodes > 1)}"
    if config is None:
        return [Finding("processes", text)]
    try:
        check_cluster(config.cluster, place, own_launcher())
    except ClusterError as error:
        return [problem("processes", f"{text}, but {error.message}", error.next_step)]
    try:
        count = accumulation_steps(config, processes)
    except Exception as error:
        return [of_error("processes", error)]
    data = config.data
    batch = f"{data.global_batch_size} = {processes} x {data.micro_batch_size} x {count} accumulated"
    return [Finding("processes", f"{text}; batch of {batch}")]
