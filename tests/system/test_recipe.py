"""``swinv2-scale recipe run``: a chain that is stopped in the middle of its second stage, and gone on with."""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.support import launchers
from tests.support.kills import newest_step
from tests.support.small_run import LIGHT, metrics, write_config

#: The supervisor looks at what it was told once a second; the second stage takes several.
STEPS, SECOND_STEPS = 3, 80
SETTINGS = (*LIGHT, "checkpoint.every_steps=1000", "evaluation.samples=8", "optim.warmup_steps=1", "data.num_workers=0")


@pytest.mark.system  # half a minute; unit tests have the chain's rules
def test_f16_a_recipe_that_is_stopped_goes_on_in_the_stage_where_it_was(tmp_path: Path, shards: Path) -> None:
    write_config(tmp_path, shards)
    (tmp_path / "x.yaml").write_text(
        f"""
stages:
  - {{name: first, config: small.yaml, overrides: [optim.total_steps={STEPS}]}}
  - name: second
    config: small.yaml
    overrides: [optim.total_steps={SECOND_STEPS}, model.image_size=64, model.window_size=8]
"""
    )
    first, second = tmp_path / "runs" / "01-first", tmp_path / "runs" / "02-second"
    command = [sys.executable, "-m", "swinv2_scale", "recipe", "run", tmp_path / "x.yaml", "--dir", tmp_path / "runs"]
    command += ["--launcher", "python", *SETTINGS]

    job = launchers.start(command, second)
    job.wait_for_step(2)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 85, job.output
    assert "stage 2 of 2, second: stopped; this goes on from there: swinv2-scale recipe run" in job.output
    assert [row["step"] for row in metrics(first)] == list(range(1, STEPS + 1))
    assert 2 <= newest_step(second) == len(metrics(second)) < SECOND_STEPS

    job = launchers.start(command, second)
    assert job.wait() == 0, job.output
    assert "stage 1 of 2, first: finished" in job.output
    assert [row["step"] for row in metrics(second)] == list(range(1, SECOND_STEPS + 1))
    config = (second / "config.yaml").read_text()
    assert f"init_from: {first}" in config
    assert "pretrained_window_sizes: [4, 4]" in config
    codes = [json.loads(line).get("exit_code") for line in (second / "lives.jsonl").read_text().splitlines()]
    assert [code for code in codes if code is not None] == [85, 0]
    assert len((first / "lives.jsonl").read_text().splitlines()) == 2  # begun and ended, once
