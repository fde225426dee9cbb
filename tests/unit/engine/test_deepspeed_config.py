"""The typed translator: what is sent to DeepSpeed, and that the live engine is compared with what was asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.deepspeed_config import read_back, translate
from swinv2_scale.errors import ConfigError
from swinv2_scale.plan.batch import accumulation_steps
from tests.support.processes import REPOSITORY
from tests.support.small_run import write_config

GIANT = REPOSITORY / "configs" / "stages" / "giant" / "simmim_192w12.yaml"


def test_the_giant_stage_on_512_gpus_is_sent_as_this() -> None:
    assert translate(load_config(GIANT).config, 512) == {
        "train_batch_size": 9216,
        "train_micro_batch_size_per_gpu": 18,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 100.0,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 500_000_000,
            "stage3_prefetch_bucket_size": 100_000_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "leaf_module": {"classes": ["swinv2_scale.models.block.Block"]},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


def test_overrides_are_merged_into_their_sections() -> None:
    overrides = ["engine.deepspeed_overrides.zero_optimization.stage3_max_reuse_distance=5"]
    zero = translate(load_config(GIANT, overrides).config, 512)["zero_optimization"]
    assert zero["stage3_max_reuse_distance"] == 5
    assert zero["stage"] == 3


def test_the_giant_stage_with_everything_in_files_is_sent_as_this() -> None:
    offload = ("optimizer_states=nvme", "parameters=nvme", "nvme_dir=/scratch", "sub_group_elements=1_000_000")
    settings = [*(f"engine.offload.{setting}" for setting in offload), "optim.ema_decay=0.9999"]
    limits = ["engine.max_live_elements=0", "engine.prefetch_bucket_elements=0"]
    limits += ["engine.deepspeed_overrides.zero_optimization.stage3_max_reuse_distance=120_000_000"]
    sent = translate(load_config(GIANT, [*settings, *limits]).config, 512)
    place = {"device": "nvme", "nvme_path": "/scratch", "pin_memory": torch.cuda.is_available()}
    # Master, gradient, two moments, average.
    assert sent["zero_optimization"]["offload_optimizer"] == {**place, "buffer_count": 5}
    assert sent["zero_optimization"]["sub_group_size"] == 1_000_000
    # Parts of 512 processes below 1 MiB stay in memory: all of it.
    assert sent["zero_optimization"]["offload_param"] == {**place, "max_in_cpu": 0, "buffer_count": 1, "buffer_size": 1}
    assert "data_types" not in sent  # one micro-batch: nothing is added up
    # The largest weight, and as many of the smallest as 40 million and the small ones that stay whole allow.
    alone = translate(load_config(GIANT, [*settings, *limits, "data.global_batch_size=18"]).config, 1)
    assert alone["zero_optimization"]["offload_param"]["buffer_size"] == 4096 * 16384
    assert alone["zero_optimization"]["offload_param"]["buffer_count"] > 1


def test_accumulation_follows_from_the_global_batch() -> None:
    config = load_config(GIANT).config
    assert [accumulation_steps(config, n) for n in (512, 256, 64, 1)] == [1, 2, 8, 512]
    with pytest.raises(ConfigError, match=r"18 x 500 processes = 9000"):
        accumulation_steps(config, 500)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.start(30)
    yield
    dist.stop()


@pytest.mark.usefixtures("_one_process")
def test_a_live_engine_that_does_something_else_is_refused(tmp_path: Path, shards: Path) -> None:
    from swinv2_scale.engine.job import build_engine
    from swinv2_scale.tasks.simmim import SimMIMTask

    path = write_config(tmp_path, shards)
    config = load_config(path).config
    engine = build_engine(config, SimMIMTask(config))
    read_back(engine, config, 1)
    overrides = ["engine.zero_stage=2", "engine.precision=fp32", "optim.clip_grad_norm=1", "data.micro_batch_size=2"]
    with pytest.raises(ConfigError) as refusal:
        read_back(engine, load_config(path, overrides).config, 1)
    assert [problem.key for problem in refusal.value.problems] == [
        "engine.zero_stage",
        "engine.precision (weights)",
        "optim.clip_grad_norm",
        "data.micro_batch_size",
        "accumulation steps",
    ]
