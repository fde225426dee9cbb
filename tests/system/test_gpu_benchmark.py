"""benchmarks/gpu.py and gpu_attention.py on a CPU: that they run, and what becomes of cases that fail. What they
measure needs a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY / "benchmarks" / "gpu.py"
DEADLINE_S = 120


def run(*arguments: str, benchmark: Path = BENCHMARK) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(benchmark), *arguments]
    return subprocess.run(
        command, env=environment, check=True, text=True, stdout=subprocess.PIPE, timeout=DEADLINE_S
    ).stdout


def rows(output: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    header, _, *table = lines
    return [dict(zip(header, line, strict=True)) for line in table]


@pytest.mark.system
def test_the_smoke_test_measures_a_real_step() -> None:
    (row,) = rows(run("--smoke", "--steps", "2", "--peak-tflops", "1"))
    assert row["model"] == "tiny 32/4"
    rate, step_s = float(row["images/s"]), float(row["s a step"])
    # Two images a step; the table rounds to a tenth of an image, and to 0.1 ms of a step of some 50 ms.
    assert rate == pytest.approx(2 / step_s, rel=0.02)
    assert float(row["peak GiB"]) > 0.1


def test_only_a_gpu_whose_peak_is_known_gets_a_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    known_peak = importlib.import_module("gpu").known_peak
    names = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA L4", "CPU")
    assert [known_peak(name) for name in names] == [312, 989, 989, None, None, None]


@pytest.mark.system
def test_every_part_of_the_attention_s_benchmark_runs_in_triton_s_interpreter(tmp_path: Path) -> None:
    run("--folder", str(tmp_path), "--dry-run", benchmark=BENCHMARK.with_name("gpu_attention.py"))
    found = json.loads((tmp_path / "attention.json").read_text())["rows"]
    (check,) = found["checks"]
    # float32, one small tile: rounding, and nothing of an order of sums that changes.
    assert max(map(float, check["triton"].split())) < 1e-4
    assert check["same_bits"]
    assert len(found["sweep"]) == 2
    assert [row["backend"] for row in found["operator"]] == ["triton", "eager", "sdpa", "sequential"]
    assert len(found["steps"]) == 5
    assert all(isinstance(row["step ms"], float) for row in found["steps"]), found["steps"]
    text = (tmp_path / "attention.md").read_text()
    assert "((64, 2, 16), Launches(Launch(" in text
    assert "All parts were done." in text


@pytest.mark.system
def test_a_case_that_takes_too_long_is_a_row_and_the_next_one_comes() -> None:
    found = rows(run("--models", "tiny", "--case-s", "0.01", "--budget-s", "1"))
    assert len(found) > 1
    assert {row["s a step"] for row in found} == {"took more than 0 s"}


@pytest.mark.system
def test_where_memory_is_short_half_the_micro_batch_is_tried() -> None:
    size = 2**34  # x 3 x 32 x 32 bytes: more than any machine has, also halved as often as there is time for
    sizes = ("data.global_batch_size", "data.micro_batch_size")
    found = rows(run("--smoke", "--case-s", "60", "--budget-s", "72", "--", *(f"{name}={size}" for name in sizes)))
    assert {row["s a step"] for row in found} == {"out of memory"}
    assert [int(row["micro-batch"]) for row in found] == [size >> number for number in range(len(found))]


@pytest.mark.system
def test_a_wrong_configuration_is_a_row_too() -> None:
    (row,) = rows(run("--smoke", "--", "data.micro_batch_size=0"))
    assert "micro_batch_size" in row["s a step"]
