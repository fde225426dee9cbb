"""metrics.jsonl after kills, resumes and numbers that JSON doesn't know."""

import json
import math
from pathlib import Path

from swinv2_scale.telemetry.metrics import MetricsFile, read_metrics


def write_rows(path: Path, steps: range, resumed_step: int) -> None:
    file = MetricsFile(path, resumed_step)
    for step in steps:
        file.write({"step": step, "loss": 1 / step})
    file.close()


def test_rows_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(1, 9), 0)
    write_rows(path, range(6, 8), 5)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_new_run_forgets_a_life_that_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(1, 4), 0)
    write_rows(path, range(1, 2), 0)
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_a_line_cut_by_a_kill_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(1, 4), 0)
    with path.open("a") as file:
        file.write('{"step": 4, "loss": 0.')
    write_rows(path, range(4, 6), 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]


def test_numbers_inside_lists_and_mappings_are_null_too(tmp_path: Path) -> None:
    path = tmp_path / "anomalies.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1, "amplitudes": {"block": math.inf, "other": 1.5}, "losses": [0.5, (math.nan,)]})
    file.close()
    assert read_metrics(path) == [{"step": 1, "amplitudes": {"block": None, "other": 1.5}, "losses": [0.5, [None]]}]


def test_rows_can_be_dropped_by_what_never_turns_back(tmp_path: Path) -> None:
    path = tmp_path / "anomalies.jsonl"
    file = MetricsFile(path, 0, key="samples_seen")
    for step, samples_seen in ((6, 96), (4, 96), (5, 112)):
        file.write({"step": step, "samples_seen": samples_seen})
    file.close()
    MetricsFile(path, 96, key="samples_seen").close()
    assert [row["step"] for row in read_metrics(path)] == [6, 4]
