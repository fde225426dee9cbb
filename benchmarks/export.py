"""Host memory of exporting a ZeRO-3 checkpoint: one tensor at a time, never the whole model.

    .venv/bin/python benchmarks/export.py > benchmarks/results/export_HARDWARE_YYYYMM.md

Two processes train SwinV2-L for one step (SimMIM, ZeRO-3, bf16, real photographs) and save; then `swinv2-scale export`
writes it for Hugging Face, and in our own format. Watched every 10 ms: RssAnon, what the process has allocated. Pages
of mapped files are not in it; the system takes them back when it needs them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine, describe_versions

REPOSITORY = Path(__file__).parents[1]
CONFIG = "configs/stages/large/simmim_192w12.yaml"
DATA = ("data.train=embedded:photographs/train", "data.validation=null", "data.num_workers=0")
BATCH = ("data.global_batch_size=2", "data.micro_batch_size=1", "optim.warmup_steps=0")
BUCKETS = ("engine.reduce_bucket_elements=10_000_000", "engine.prefetch_bucket_elements=1_000_000")


def main() -> None:
    print("# Exporting a ZeRO-3 checkpoint\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed', 'safetensors')}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["--config", CONFIG, "--run-dir", str(run), "--steps", "1", f"data.shards_dir={folder}/shards"]
        launch = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2", "launch/pretrain.py"]
        subprocess.run([*launch, *arguments, *DATA, *BATCH, *BUCKETS], cwd=REPOSITORY, check=True, stdout=sys.stderr)
        size = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*"))
        print(f"- checkpoint: {CONFIG}, 2 processes, ZeRO-3, bf16; {size / 2**20:.0f} MiB\n")
        print("| format | written, MiB | allocated before writing, MiB | largest while writing, MiB | wall s |")
        print("|---|---|---|---|---|")
        for style, target in (("hf", Path(folder) / "hf"), ("native", Path(folder) / "native.safetensors")):
            before, peak, wall_s = watch(["export", str(run), str(target), "--format", style])
            files = [target] if target.is_file() else list(target.iterdir())
            written = sum(path.stat().st_size for path in files) / 2**20
            print(f"| {style} | {written:.0f} | {before:.0f} | {peak:.0f} | {wall_s:.1f} |")


def watch(arguments: list[str]) -> tuple[float, float, float]:
    """RssAnon in MiB when the first line is printed (everything imported, nothing read), and its largest; seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-u", "-m", "swinv2_scale", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    before = peak = allocated(process.pid)
    while process.poll() is None:
        peak = max(peak, allocated(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return before, peak, time.perf_counter() - started


def allocated(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


if __name__ == "__main__":
    main()
