"""Ways to save memory change no number: checkpointing, sequential attention, and the giant's whole stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import REPOSITORY, pretrain, run_worker
from tests.support.small_run import metrics, write_config

#: The giant stage with only width, heads, batch and the third stage's depth overridden, and where its photographs come
#: from. Seven blocks are one past the extra norm; test_first_values.py builds all 42, which take minutes to train.
GIANT = [
    "model.depths=[2,2,7,2]",
    "model.embed_dim=16",
    "model.num_heads=[1,2,4,8]",
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "data.train=embedded:photographs/train",
    "data.validation=null",
    # A matter of speed: DeepSpeed's search within that distance takes half the time of so many small modules.
    "engine.deepspeed_overrides.zero_optimization.stage3_max_reuse_distance=0",
]


def compare(config: Path, ways: list[list[str]]) -> list[dict[str, Any]]:
    output = run_worker("gradients.py", config, *map(json.dumps, ways), processes=2).output
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    parsed: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    return parsed


def test_activation_checkpointing_gives_the_same_bits_under_zero_3(tmp_path: Path, shards: Path) -> None:
    config = write_config(tmp_path, shards)
    key = "engine.activation_checkpointing"
    ways = [
        [f"{key}.backend=none"],
        [f"{key}.backend=torch"],
        [f"{key}.backend=torch", f"{key}.offload=true"],
        [f"{key}.backend=fairscale"],
        [f"{key}.backend=fairscale", f"{key}.offload=true"],
    ]
    none, *others = compare(config, [[*way, "data.global_batch_size=8"] for way in ways])
    assert none["count"] == 80  # 4 blocks x 17, embedding 4, merging 3, norm 2, mask token 1, decoder 2
    for way in others:
        assert way["losses"] == none["losses"]
        assert way["differences"] == [0.0, 0.0]


@pytest.fixture(scope="module")
def giant() -> Path:
    return REPOSITORY / "configs" / "stages" / "giant" / "simmim_192w12.yaml"


@pytest.mark.system
def test_the_giant_stage_equals_eager_attention_without_checkpointing(
    giant: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shards_dir = [f"data.shards_dir={tmp_path_factory.mktemp('photographs')}"]
    exact = [*GIANT, *shards_dir, "engine.precision=fp32"]
    eager = ["model.attention.backend=eager", "engine.activation_checkpointing.backend=none"]
    # A small bound makes `sequential` split tiles, heads and rows, as it does at full size.
    split = ["model.attention.max_score_bytes=100000"]
    plain, stage = compare(giant, [[*exact, *eager], [*exact, *split]])
    # Float32 throughout; only the order of additions differs, over 13 blocks.
    assert stage["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert max(stage["differences"]) < 1e-3
    assert stage["count"] == plain["count"] > 200


@pytest.mark.system
def test_the_giant_stage_launches_and_trains(giant: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = pretrain(
        "--config", giant, "--run-dir", run, "--steps", 2, *GIANT, f"data.shards_dir={tmp_path}", processes=2
    )
    assert finished.code == 0, finished.output
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert "ZeRO stage 3, bf16, attention sequential/sequential/eager/eager" in finished.output


@pytest.mark.system
def test_compiled_blocks_give_the_same_gradients_under_zero_3(tmp_path: Path, shards: Path) -> None:
    # Float32 in every way. Compiled code adds up in other orders; DeepSpeed's own Linear is torch's matmul.
    config = write_config(tmp_path, shards)
    base = ["data.global_batch_size=8", "engine.precision=fp32", "model.depths=[1,1]"]
    plain, compiled = compare(config, [base, [*base, "model.compile=true"]])
    assert compiled["count"] == plain["count"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert max(compiled["differences"]) < 1e-3
