"""What grows with the number of ranks in our own code: hundreds of them, simulated, on one machine.

    .venv/bin/python benchmarks/many_ranks.py [SECTION ..] > benchmarks/results/many_ranks_HARDWARE_YYYYMM.md

Real code, real files, real sockets; only the ranks are pretended: the order of samples is asked for each of them, one
process after the other opens what a rank opens, eight processes hold the connections of 512 ranks to one store. Needs
strace (apt-get install strace) for the table of file operations.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import describe_machine, describe_versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from swinv2_scale import dist  # noqa: E402
from swinv2_scale.config.run import CheckpointConfig  # noqa: E402
from swinv2_scale.data.loader import sample_digest  # noqa: E402
from swinv2_scale.data.order import Order, positions_of  # noqa: E402
from swinv2_scale.data.shards.manifest import INDEX_ENTRY, ShardEntry, write_manifest  # noqa: E402
from swinv2_scale.data.shards.shard_set import read_shard_set  # noqa: E402
from swinv2_scale.engine import checkpoint, random_states, retention  # noqa: E402
from swinv2_scale.engine.checkpoint import Checkpoint, FileRecord, manifest_text  # noqa: E402
from swinv2_scale.engine.consolidate import ALLOWED_CLASSES, SavedTensors  # noqa: E402
from swinv2_scale.engine.watchdog import Beat  # noqa: E402
from tests.support.small_run import write_config  # noqa: E402

RANKS = (1, 8, 64, 512, 1000)
CLIENTS = 8
RANKS_A_NODE = 8


def main() -> None:
    print("# Many ranks, simulated\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print("- command: `.venv/bin/python benchmarks/many_ranks.py`\n")
    with tempfile.TemporaryDirectory() as name:
        sections = {
            "order": order,
            "manifests": lambda: manifests(Path(name)),
            "start_up": lambda: start_up(Path(name)),
            "store": store,
            "checkpoints": lambda: checkpoints(Path(name) / "checkpoints"),
            "resume": lambda: resume(Path(name) / "resume"),
        }
        for section in sys.argv[1:] or sections:
            sections[section]()


def order() -> None:
    print("## The order of samples: one step of 64,000, dealt to W ranks\n")
    print("| ranks | dealt | more than once | sum of digests as with one rank | a rank's step of 64, ms |")
    print("|---|---|---|---|---|")
    places = Order.of((1281,) * 1000, 0, True, 64)
    digests = {p: sample_digest(p, "{2}/{3}".format(*places.locate(p))) for p in range(128_000, 192_000)}
    whole = sum(digests.values())
    for ranks in RANKS:
        dealt = Counter(p for rank in range(ranks) for part in positions_of(2, 64_000, 64, rank, ranks) for p in part)
        begun = time.perf_counter()
        for position in positions_of(2, 64_000, 64, ranks - 1, ranks)[0]:
            places.locate(position)
        seconds = time.perf_counter() - begun
        same = sum(digests[position] for position in dealt) == whole
        twice = sum(count > 1 for count in dealt.values())
        print(f"| {ranks} | {len(dealt):,} | {twice} | {'yes' if same else 'NO'} | {seconds * 1e3:.2f} |", flush=True)
    print()


def manifests(folder: Path) -> None:
    print("## The manifest: read by rank 0, broadcast; sizes of all files looked up by one process of each node\n")
    print("| shards | samples | manifest, MiB | read, s | broadcast, MiB | look-ups a node | local disk, s |")
    print("|---|---|---|---|---|---|---|")
    for count in (1_000, 14_000):
        place = folder / f"shards-{count}"
        place.mkdir()
        entries = [ShardEntry(f"{n:06d}.tar", 1000, 2**20, f"{n:064x}") for n in range(count)]
        write_manifest(place, entries, "benchmarks/many_ranks.py")
        for entry in entries:
            for path, size in ((entry.name, entry.bytes), (f"{entry.name}.index", entry.samples * INDEX_ENTRY.size)):
                with (place / path).open("wb") as file:
                    file.truncate(size)
        begun = time.perf_counter()
        shards = read_shard_set(f"{place}/*.tar")
        read_s = time.perf_counter() - begun
        begun = time.perf_counter()
        assert not shards.file_problems()
        look_s = time.perf_counter() - begun
        size = (place / "manifest.json").stat().st_size / 2**20
        sent = len(multiprocessing.reduction.ForkingPickler.dumps(shards)) / 2**20
        cells = (f"{shards.num_samples:,}", f"{size:.1f}", f"{read_s:.2f}", f"{sent:.1f}", f"{2 * count:,}")
        print(f"| {count:,} | {' | '.join(cells)} | {look_s:.2f} |", flush=True)
        shutil.rmtree(place)
    print()


def start_up(folder: Path) -> None:
    """A real job of two ranks, one step, under strace: as two nodes of one rank, and as one node of two."""
    print("## Files that a rank opens or asks about until the end of its first step (strace, workers included)\n")
    if not shutil.which("strace"):
        print("strace is not installed\n")
        return
    kinds = ("python and libraries", "our package", "git", "shards", "run directory", "else")
    print("| rank | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    config = write_config(folder, folder / "shards")
    for name, local_ranks in (("rank 0", 2), ("another rank of a node", 2), ("the first rank of another node", 1)):
        run = folder / "run"
        traces = run_traced(config, run, local_ranks)
        counts = traces[0 if name == "rank 0" else 1]
        print(f"| {name} | " + " | ".join(f"{counts[kind]:,}" for kind in kinds) + " |", flush=True)
        shutil.rmtree(run)
    print(f"\n512 ranks, {RANKS_A_NODE} a node: 1 x rank 0, 63 x first of a node, 448 x another rank.\n")


def run_traced(config: Path, run: Path, local_ranks: int) -> list[Counter[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(2):
        local = str(rank % local_ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": local}
        environment |= {"LOCAL_WORLD_SIZE": str(local_ranks), "PYTHONDONTWRITEBYTECODE": "1"}
        trace = run.with_name(f"trace-{rank}")
        command = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace), sys.executable]
        command += [
            str(ROOT / "launch" / "pretrain.py"),
            "--config",
            str(config),
            "--run-dir",
            str(run),
            "--steps",
            "1",
        ]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    return [counted(run.with_name(f"trace-{rank}"), run) for rank in range(2)]


def counted(trace: Path, run: Path) -> Counter[str]:
    """How many calls name a file of each kind; git's own processes count as git."""
    counts: Counter[str] = Counter()
    gits = set()
    for line in trace.read_text(errors="replace").splitlines():
        pid, _, call = line.partition(" ")
        found = re.search(r'"([^"]*)"', call)
        if not found:
            continue
        path = found[1]
        if "execve" in call and path.endswith("/git") and not call.rstrip().endswith("(No such file or directory)"):
            gits.add(pid)
        if pid in gits:
            kind = "git"
        elif str(run) in path:
            kind = "run directory"
        elif str(run.parent) in path:
            kind = "shards"
        elif str(ROOT / "swinv2_scale") in path:
            kind = "our package"
        elif path.startswith(("/usr/", "/lib", "/opt/", sys.prefix, sys.base_prefix, "/etc/")):
            kind = "python and libraries"
        else:
            kind = "else"
        counts[kind] += 1
    return counts


def store() -> None:
    print("## The job's store: every rank's beat each second, and all beats read by every rank when one is missing\n")
    print("One real TCPStore in a process of its own; a connection and a thread for each rank, in eight processes.\n")
    print("| ranks | store's open files | a round of beats, s | store's CPU, ms | all read all, s | store's CPU, s |")
    print("|---|---|---|---|---|---|")
    for ranks in (8, 64, 512):
        files, beat_s, beat_cpu, read_s, read_cpu = store_rounds(ranks)
        row = f"| {ranks} | {files:.0f} | {beat_s:.3f} | {beat_cpu * 1e3:.0f} | {read_s:.2f} | {read_cpu:.2f} |"
        print(row, flush=True)
    print()


def store_rounds(ranks: int) -> tuple[float, float, float, float, float]:
    """(open files, seconds and CPU seconds of a round of beats, the same of every rank reading all beats)."""
    code = "import torch.distributed as d,sys,time;s=d.TCPStore('127.0.0.1',0,is_master=True,wait_for_workers=False)\n"
    code += "print(s.port,flush=True);sys.stdin.read()"
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.stdout.readline().strip()}
    context = multiprocessing.get_context("fork")
    watched, gate, slowest = psutil.Process(server.pid), context.Barrier(CLIENTS + 1), context.SimpleQueue()
    clients = [
        context.Process(target=hold, args=(range(first, ranks, CLIENTS), ranks, gate, slowest))
        for first in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    used, files = [], 0
    for _ in range(3):  # connected; beats written; all read
        gate.wait(120)
        used.append(sum(watched.cpu_times()[:2]))
        files = max(files, watched.num_fds())
    found = [slowest.get() for _ in clients]
    for client in clients:
        client.join()
    server.communicate("")
    beat_s, read_s = (max(seconds) for seconds in zip(*found, strict=True))
    return files, beat_s, used[1] - used[0], read_s, used[2] - used[1]


def hold(mine: range, ranks: int, gate: Any, slowest: Any) -> None:
    """The boards of some ranks, and what each asks of the store; engine/watchdog.py's own words."""
    with ThreadPoolExecutor(len(mine)) as pool:  # a connection takes a tenth of a second here
        boards = list(pool.map(lambda _: dist.Board(), mine))
    note = json.dumps(list(asdict(Beat(1000, 2000, 900, "waiting for samples", "node-0042")).values()))
    everybody = [str(rank) for rank in range(ranks)]
    for rank, board in zip(mine, boards, strict=True):
        board.write(str(rank), note)

    def beat(rank: int, board: dist.Board) -> float:
        begun = time.perf_counter()
        board.write(str(rank), note)
        board.read(["0"])
        board.read(["finding"])
        return time.perf_counter() - begun

    def read_all(rank: int, board: dist.Board) -> float:
        begun = time.perf_counter()
        found = board.read(everybody)
        assert found is not None
        assert len(found) == ranks
        return time.perf_counter() - begun

    seconds = []
    with ThreadPoolExecutor(len(boards)) as pool:
        for action in (beat, read_all):
            gate.wait(120)
            seconds.append(max(pool.map(action, mine, boards)))
        gate.wait(120)
    slowest.put(seconds)


def checkpoints(folder: Path) -> None:
    print("## A checkpoint's manifest: three files a rank, and the 25 checkpoints that a prune reads\n")
    print("| ranks | files | manifest, KiB | made and read, ms | bytes gathered of a rank | pruned to 3 of 25, s |")
    print("|---|---|---|---|---|---|")
    for ranks in RANKS:
        records = [
            FileRecord(name, 2**20, hashlib.sha256(name.encode()).hexdigest())
            for rank in range(ranks)
            for name in (
                f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
                f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
                random_states.file_name(rank),
            )
        ]
        for step in range(1, 26):
            (folder / f"step-{step:08d}").mkdir(parents=True)
            (folder / f"step-{step:08d}" / "manifest.json").write_text(manifest_text(step, ranks, records))
        begun = time.perf_counter()
        text = manifest_text(25, ranks, records)
        assert set(checkpoint.read(folder / "step-00000025").files) == set(records)
        once_s = time.perf_counter() - begun
        begun = time.perf_counter()
        gone = retention.prune(folder, 25, CheckpointConfig(keep=3), lambda _: True)
        prune_s = time.perf_counter() - begun
        assert len(gone) == 22
        sent = len(multiprocessing.reduction.ForkingPickler.dumps(records[:3]))
        row = f"| {ranks} | {len(records):,} | {len(text) / 1024:.0f} | {once_s * 1e3:.1f} | {sent} | {prune_s:.3f} |"
        print(row, flush=True)
        shutil.rmtree(folder)
    print()


def resume(folder: Path) -> None:
    """A ZeRO-3 checkpoint of one process, cut into those of W as DeepSpeed would have, opened by one rank."""
    print("## A resumed rank opens the files of all ranks (SavedTensors, ZeRO-3)\n")
    print("| ranks | files a rank opens | all ranks together | one rank's CPU, s (local disk, cached) |")
    print("|---|---|---|---|")
    folder.mkdir()
    config = write_config(folder, folder / "shards")
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(config), "--steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["--run-dir", str(folder / "run")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    (source,) = checkpoint.find(folder / "run" / "checkpoints")
    for ranks in (1, 8, 64, 512):
        cut = cut_for(source, ranks, folder / f"of-{ranks}")
        begun = time.process_time()
        saved = SavedTensors(cut)
        seconds = time.process_time() - begun
        whole = SavedTensors(source)
        assert all(saved.tensor(name).equal(whole.tensor(name)) for name in list(whole.shapes)[::7])
        print(f"| {ranks} | {ranks + 1} | {ranks * (ranks + 1):,} | {seconds:.3f} |", flush=True)
        shutil.rmtree(cut.path)
    print()


def cut_for(source: Checkpoint, ranks: int, folder: Path) -> Checkpoint:
    folder.mkdir()
    names = {record.name for record in source.files}
    (model,) = (name for name in names if name.endswith("model_states.pt"))
    (optimizer,) = (name for name in names if name.endswith("optim_states.pt"))
    with torch.serialization.safe_globals(ALLOWED_CLASSES):
        shapes = torch.load(source.path / model, weights_only=True)["param_shapes"]
        whole = torch.load(source.path / optimizer, weights_only=True)
    states = whole["optimizer_state_dict"]
    flats, moments = states["fp32_flat_groups"], states["optimizer_state_dict"]["state"]
    records = []

    def written(name: str, content: Any) -> None:
        torch.save(content, folder / name) if content else shutil.copy(source.path / model, folder / name)
        records.append(FileRecord(name, (folder / name).stat().st_size, "0" * 64))

    def part(flat: torch.Tensor, group: dict[str, torch.Size], rank: int) -> torch.Tensor:
        pieces, start = [], 0
        for shape in group.values():
            size = -(-shape.numel() // ranks)
            values = torch.nn.functional.pad(flat[start : start + shape.numel()], (0, size * ranks - shape.numel()))
            pieces.append(values[rank * size : (rank + 1) * size])
            start += shape.numel()
        return torch.cat(pieces)

    for rank in range(ranks):
        states["fp32_flat_groups"] = [part(f.detach(), g, rank) for f, g in zip(flats, shapes, strict=True)]
        states["optimizer_state_dict"]["state"] = {
            number: {k: part(v, shapes[number], rank) if v.numel() > 1 else v for k, v in holder.items()}
            for number, holder in moments.items()
        }
        written(optimizer.replace("rank_0_mp", f"rank_{rank}_mp"), whole)
        written(model.replace("rank_0_mp", f"rank_{rank}_mp"), None)
    return Checkpoint(folder, source.step, ranks, tuple(records))


if __name__ == "__main__":
    main()
