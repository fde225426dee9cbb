"""``swinv2-scale plan``: tables for people, JSON for programs, and one error where a run can't be dealt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.cli.main import main
from swinv2_scale.data.shards.manifest import ShardEntry, write_manifest

REPOSITORY = Path(__file__).parents[3]
GIANT = str(REPOSITORY / "configs" / "stages" / "giant" / "simmim_192w12.yaml")
ASKED = ("--gpus", "64", "--nodes", "8", "--gpu-memory", "40GiB")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 78
    return capsys.readouterr().err


def test_a_plan_for_people_says_all_that_was_promised(capsys):
    assert main(["plan", GIANT, *ASKED]) == 0
    text = capsys.readouterr().out
    for promised in (
        *("3,010,430,176 parameters", "float32 masters", "moments", "gradients", "buckets", "gathered weights"),
        *("the largest attention tensor", "checkpoint: 33.6 GiB", "GFLOP forward", "images/s", "days for all steps"),
        *("40% of 312 TFLOP/s", "1600 Gbit/s", "It fits", "The largest data.micro_batch_size"),
    ):
        assert promised in text
    stages = [line for line in text.splitlines() if line.count("│") == 11 and ("fits" in line or "large" in line)]
    assert [line.split("│")[2].strip()[:1] for line in stages] == ["0", "1", "2", "3", "3"]
    assert [line.split("│")[1].strip() for line in stages] == ["", "", "", ">", ""]


def test_overrides_may_stand_anywhere(capsys):
    first = planned(capsys, GIANT, "data.micro_batch_size=9", "engine.zero_stage=2", *ASKED)
    assert planned(capsys, GIANT, *ASKED, "data.micro_batch_size=9", "engine.zero_stage=2") == first
    assert first["schedule"]["micro_batches"] == 16
    assert [row["stage"] for row in first["zero"] if row["is_configured"]] == [2]


def test_a_run_that_does_not_fit_is_told_what_to_change_cheapest_first(capsys):
    large = ("model.image_size=1536", "model.window_size=48", "data.micro_batch_size=8", "engine.zero_stage=1")
    found = planned(capsys, GIANT, *ASKED, *large, "engine.activation_checkpointing.backend=none")
    assert not found["memory"]["fits"]
    keys = [change["overrides"][0].partition("=")[0] for change in found["changes"]]
    assert keys[:3] == ["engine.activation_checkpointing.backend", "model.attention.backend", "engine.zero_stage"]
    totals = [change["total"] for change in found["changes"]]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= found["memory"]["limit"] < totals[-2]
    # What is advised is what a plan of it says.
    overrides = dict(word.split("=") for change in found["changes"] for word in change["overrides"])
    again = planned(capsys, GIANT, *ASKED, *large, *(f"{key}={value}" for key, value in overrides.items()))
    assert again["memory"]["total"] == totals[-1]
    assert again["memory"]["fits"]


def test_gpus_that_are_not_a_multiple_of_nodes_are_refused_with_the_nearest_that_are(capsys):
    assert "56 and 64 GPUs are" in refused(capsys, GIANT, "--gpus", "60", "--nodes", "8")


def test_a_batch_that_cannot_be_dealt_is_refused_with_the_nearest_that_can(capsys):
    text = refused(capsys, GIANT, "--gpus", "40", "--nodes", "5")
    assert "9216 is not a multiple of data.micro_batch_size 18 x 40 processes = 720; 8640 and 9360 are" in text
    assert "with 32 processes these micro-batches fit: [1, 2, 3," in refused(
        capsys, GIANT, "--gpus", "32", "--nodes", "4", "data.micro_batch_size=512"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "how many GPUs?"),
        (("--gpus", "8", "--gpu-memory", "plenty"), "'plenty' is no size of memory"),
        (("--gpus", "8", "--gpu-memory", "1e999"), "is no size of memory"),
        (("--gpus", "8", "--efficiency", "1.5"), "can't be reached"),
        (("--gpus", "8", "--efficiency", "nan"), "is no rate"),
        (("--gpus", "8", "--network", "0"), "is no rate"),
        (("--gpus", "8", "--peak-tflops", "-1"), "can't be reached"),
        (("--gpus", "8", "cluster.world_size=16"), "cluster.world_size is 16, the plan is for 8 GPUs"),
        (("--gpus", "8", "cluster.num_nodes=2"), ""),
        (("--gpus", "8", "nonsense"), "nonsense"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(capsys, words, message):
    if not message:  # the configuration says how many nodes there are
        assert planned(capsys, GIANT, *words)["cluster"]["nodes"] == 2
        return
    assert message in refused(capsys, GIANT, *words)


@pytest.mark.parametrize(("pattern", "shards"), [("*.tar", 12), ("{00..02}.tar", 3), ("0?.tar", 10), ("11.tar", 1)])
def test_shards_on_a_disk_here_are_counted(capsys, tmp_path, pattern, shards):
    write_manifest(tmp_path, [ShardEntry(f"{n:02}.tar", 1000, 10**6, "0" * 64) for n in range(12)], {"jpg": 12_000})
    data = planned(capsys, GIANT, *ASKED, f"data.train={tmp_path}/{pattern}")["data"]
    assert (data["shards"], data["samples"]) == (shards, shards * 1000)
    assert data["epochs"] == pytest.approx(151_900 * 9216 / (shards * 1000))


@pytest.mark.parametrize(("pattern", "why"), [("*.tar", "manifest"), ("{a,b}.tar", "only a range of numbers")])
def test_a_plan_is_made_without_them_too(capsys, tmp_path, pattern, why):
    data = planned(capsys, GIANT, *ASKED, f"data.train={tmp_path}/{pattern}")["data"]
    assert not data["is_known"]
    assert why in data["why"]


def test_shards_elsewhere_are_not_asked_for(capsys):
    data = planned(capsys, GIANT, *ASKED, "data.train=s3://bucket/{0..9}.tar")["data"]
    assert data == {"is_known": False, "why": "s3://bucket/{0..9}.tar isn't on a disk here"}
