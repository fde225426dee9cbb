"""What a user sees when shards are damaged: every fault of tests/support/mutants.py, and damaged tars that are indexed.

    .venv/bin/python benchmarks/data_faults.py > benchmarks/results/data_faults_HARDWARE_YYYYMM.md

For each fault, 48 photographs in three shards: `swinv2-scale shards verify`, a training that allows no damage, and one
that allows 40 % of the samples to be replaced; one epoch of SimMIM in one process. Exit codes and the line that counts.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.support.mutants import MUTANTS, Mutant, write_mutant  # noqa: E402

CONFIG = """
model: {variant: tiny, image_size: 32, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 4]}
task: {mask_patch_size: 8}
data: {global_batch_size: 8, micro_batch_size: 8, num_workers: 1}
optim: {lr: 1.0e-3, total_steps: 6}
engine: {precision: fp32}
logging: {tensorboard: false}
"""


def main() -> None:
    print("# Faults of shards, and what the commands say\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'webdataset', 'pillow', 'simplejpeg')}")
    print("- command: `.venv/bin/python benchmarks/data_faults.py`\n")
    print("## Found by a job and by `shards verify`\n")
    print("48 samples; lost: how many of them the fault costs.\n")
    print("| fault | lost | `shards verify` | run that allows no damage | run that may replace 40 % |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(2) as pool:  # of processes, in fact
            rows = pool.map(lambda job: row(job[1], Path(folder) / str(job[0])), enumerate(MUTANTS))
            for line in rows:
                print(line, flush=True)
        print("\n## Tars that were damaged before they had a manifest\n")
        print("20 samples of two files each, by Python's tarfile.\n")
        print("| fault | `shards index` | `shards index --skip-damaged` |")
        print("|---|---|---|")
        for number, (name, spoil) in enumerate(TARS.items()):
            print(index_row(name, spoil, Path(folder) / f"tar-{number}"), flush=True)


def row(mutant: Mutant, folder: Path) -> str:
    folder.mkdir()
    shards = f"{write_mutant(folder / 'shards', mutant)}/{{000000..000002}}.tar"
    (folder / "config.yaml").write_text(CONFIG)
    verified = console(folder, "-m", "swinv2_scale", "shards", "verify", shards)
    cells = [mutant.name, str(len(mutant.lost)), cell(verified, "samples are damaged")]
    for name, share in (("strict", 0.0), ("lenient", 0.4)):
        run = ["launch/pretrain.py", "--config", str(folder / "config.yaml"), "--run-dir", str(folder / name)]
        finished = console(folder, *run, f"data.train={shards}", f"data.max_quarantined_share={share}")
        listed = folder / name / "quarantine.jsonl"
        count = len(listed.read_text().splitlines()) if listed.exists() else 0
        text = cell(finished, "epoch 0 is over", "error:")
        cells.append(text + (f"; {count} listed, e.g.: {first_cause(listed)}" if count else ""))
    return "| " + " | ".join(shortened(text, folder) for text in cells) + " |"


def first_cause(listed: Path) -> str:
    return str(json.loads(listed.read_text().splitlines()[0])["cause"])


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members() -> list[tuple[str, bytes]]:
    sizes = {"jpg": 700, "cls": 2}
    return [(f"{n:03d}.{kind}", bytes([n]) * size) for n in range(20) for kind, size in sizes.items()]


def cut_at(place: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, place)


def change(place: int, content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(content)

    return spoil


def with_members(edit: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> Callable[[Path], None]:
    return lambda path: make_tar(path, edit(members()))


#: A sample is 512 + 1024 + 512 + 512 bytes.
SAMPLE = 2560
TARS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "cut inside a header": cut_at(11 * SAMPLE + 100),
    "cut inside a file": cut_at(11 * SAMPLE + 700),
    "cut between samples": cut_at(11 * SAMPLE),
    "one changed byte in a header": change(5 * SAMPLE + 3, b"\xff"),
    "one zeroed block (a header)": change(5 * SAMPLE, bytes(512)),
    "a key twice": with_members(lambda m: [*m[:10], *m[4:6], *m[10:]]),
    "interleaved keys": with_members(lambda m: [m[0], m[2], m[1], m[3], *m[4:]]),
    "a missing member": with_members(lambda m: [*m[:11], *m[12:]]),
    "HTML instead of a tar": lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 40) and None,
    "empty file": cut_at(0),
}


def index_row(name: str, spoil: Callable[[Path], None], folder: Path) -> str:
    folder.mkdir()
    make_tar(folder / "000.tar", members())
    spoil(folder / "000.tar")
    strict = console(folder, "-m", "swinv2_scale", "shards", "index", str(folder))
    lenient = console(folder, "-m", "swinv2_scale", "shards", "index", str(folder), "--skip-damaged")
    cells = [name, cell(strict, "error:", " samples in "), cell(lenient, "left out", "error:", " samples in ")]
    return "| " + " | ".join(shortened(text, folder) for text in cells) + " |"


def console(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "300"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def cell(finished: subprocess.CompletedProcess[str], *wanted: str) -> str:
    """Exit code and the first line that has one of the texts; where it ends with a colon, what comes after it."""
    lines = [line for line in finished.stdout.splitlines() if line.strip("─ ")]
    for text in wanted:
        for number, line in enumerate(lines):
            if text in line:
                more = " ".join(lines[number + 1 : number + 3]) if line.endswith(":") else ""
                return f"{finished.returncode}: {line} {more}"
    return f"{finished.returncode}"


def shortened(text: str, folder: Path) -> str:
    return " ".join(text.replace(f"{folder}/", "").replace("|", "\\|").split())


if __name__ == "__main__":
    main()
