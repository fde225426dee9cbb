"""Time, traffic and the search for what fits: what must hold whatever the rates are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swinv2_scale.config.loader import load_config
from swinv2_scale.errors import ConfigError
from swinv2_scale.plan.fit import changed, largest_micro_batch, memory, ways_to_fit
from swinv2_scale.plan.machines import DEVICES, Cluster, parse_bytes
from swinv2_scale.plan.report import predicted_peak_bytes
from swinv2_scale.plan.speed import exchange_s, forward_flops, recomputed_flops, speed, training_flops
from swinv2_scale.plan.traffic import Collective

REPOSITORY = Path(__file__).parents[3]
STAGES = REPOSITORY / "configs" / "stages"
GIANT = load_config(STAGES / "giant" / "simmim_192w12.yaml").config
BASE = load_config(STAGES / "base" / "simmim_192w12.yaml").config
A100 = DEVICES["a100"]
NO_CHECKPOINTING = {"engine.activation_checkpointing.backend": "none"}


def test_one_gpu_that_waits_for_nobody_computes_at_the_stated_rate():
    config = changed(BASE, {**NO_CHECKPOINTING, "model.attention.backend": "eager"})
    assert recomputed_flops(config) == 0
    found = speed(config, Cluster(A100, 1, 1, efficiency=0.5))
    assert found.images_per_s == pytest.approx(0.5 * 312e12 / training_flops(config))
    assert found.waiting_s == 0


def test_giants_forward_is_twice_its_published_multiply_adds_and_a_pixel_head():
    # 370.7 G multiply-adds (README), less what shifted windows save, and 36 tokens of 4096 x 3072.
    assert forward_flops(GIANT) / 1e9 == pytest.approx(2 * (370.7 + 36 * 4096 * 3072 / 1e9), rel=0.005)


def test_checkpointing_computes_one_forward_again():
    plain = changed(BASE, {**NO_CHECKPOINTING, "model.attention.backend": "eager"})
    again = changed(BASE, {"model.attention.backend": "eager"})
    assert recomputed_flops(again) == forward_flops(plain)


def test_a_ring_moves_a_tensor_once_and_an_all_reduce_twice():
    gather = Collective("weights", "all_gather", 10**9, 0, "nothing")
    node = Cluster(A100, 8, 1)
    assert exchange_s(gather, node) == pytest.approx(7 / 8 * 1e9 / 300e9)
    assert exchange_s(replace(gather, kind="all_reduce"), node) == pytest.approx(2 * exchange_s(gather, node))
    slow = Cluster(A100, 16, 2, network_gbit_s=80)
    assert exchange_s(gather, slow) == pytest.approx(15 / 16 * 1e9 / 10e9)
    assert exchange_s(replace(gather, is_in_node=True), slow) == exchange_s(gather, node)


def test_a_slower_network_never_makes_a_run_faster_and_hpz_spares_it():
    config = changed(GIANT, {"engine.zero_stage": 3})
    hpz = changed(config, {"engine.deepspeed_overrides.zero_optimization.zero_hpz_partition_size": 8})
    rates = [speed(config, Cluster(A100, 64, 8, network)).images_per_s for network in (1600, 200, 100, 10)]
    assert rates == sorted(rates, reverse=True)
    slow = Cluster(A100, 64, 8, 100)
    assert speed(hpz, slow).images_per_s > speed(config, slow).images_per_s


def test_zero_1_in_bf16_holds_more_than_zero_2_because_deepspeed_sums_whole_gradients_in_float32():
    totals = [memory(changed(GIANT, {"engine.zero_stage": stage}), 64).tensors for stage in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    one, two = (memory(changed(GIANT, {"engine.zero_stage": stage}), 64).states.gradients for stage in (1, 2))
    assert one > 6 * 3e9 > 64 * two


def test_the_papers_setting_fits_its_40_gb_cards():
    # Sec. 3.5: ZeRO-1, activation checkpointing, sequential attention; appendix A2.2: 192 px.
    config = changed(GIANT, {"engine.zero_stage": 1})
    assert memory(config, 512).total <= A100.memory_bytes


def test_nothing_is_changed_where_a_run_fits():
    assert ways_to_fit(GIANT, Cluster(A100, 64, 8)) == []


def test_the_largest_micro_batch_fits_and_the_next_one_does_not():
    cluster = Cluster(A100, 64, 8)
    largest = largest_micro_batch(GIANT, cluster)
    assert largest is not None
    sizes = [n for n in range(1, 145) if 144 % n == 0]  # of 9,216 images on 64 GPUs
    fitting = [n for n in sizes if memory(changed(GIANT, {"data.micro_batch_size": n}), 64).total <= A100.memory_bytes]
    assert largest == max(fitting)


def test_a_gpu_too_small_for_anything_is_told_so_in_the_end():
    tiny = replace(A100, memory_bytes=2**30)
    last = ways_to_fit(GIANT, Cluster(tiny, 64, 8))[-1]
    assert last.total > tiny.memory_bytes
    assert "engine.offload.parameters=cpu" in last.overrides[0]


def test_more_gpus_are_advised_before_offloading():
    config = changed(GIANT, {"engine.zero_stage": 3, "data.micro_batch_size": 1})
    changes = ways_to_fit(config, Cluster(replace(A100, memory_bytes=16 * 2**30), 4, 1))
    assert changes[-1].gpus > 4
    assert not any("offload" in word for change in changes for word in change.overrides)
    assert changes[-1].total <= 16 * 2**30


def test_the_predicted_peak_is_tensors_alone():
    found = memory(GIANT, 64)
    assert predicted_peak_bytes(GIANT, 64) == found.tensors < found.total


@pytest.mark.parametrize(("text", "expected"), [("40GiB", 40 * 2**30), ("141 GB", 141 * 10**9), ("8e10", 8 * 10**10)])
def test_sizes_are_read_with_their_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 potatoes", "0", "1.2.3GiB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="no size of memory"):
        parse_bytes(text)


def test_the_page_on_scaling_is_what_its_script_writes():
    command = [sys.executable, "benchmarks/scaling_on_paper.py", "--check"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
