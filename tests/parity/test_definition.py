"""Ours is the definition, token by token, where peers disagree or fail: any map, any window, any of the backends."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from swinv2_scale.models.factory import create_model
from tests.parity.cases import TOLERANCE, Case, Result, difference, our_model, our_result
from tests.parity.definition import definition_result
from tests.support.fused_kernels import needs_fused

torch.set_num_threads(1)

FOUR = {"depths": (2, 2, 2, 2), "heads": (2, 4, 8, 16), "embed_dim": 32}
#: Where it is the later stages that matter, for time.
LATE = {**FOUR, "depths": (1, 1, 2, 2)}
THREE = {"depths": (2, 2, 2), "heads": (2, 4, 8), "embed_dim": 32}

CASES = {
    "square and dividing": Case((64, 64), 4, **FOUR),
    "twice as wide": Case((64, 128), 8, **FOUR, patch=8),
    "twice as high": Case((128, 64), 4, **FOUR, patch=8),
    "half again as high, maps that don't divide": Case((48, 32), 4, **FOUR),
    "window longer than the height": Case((16, 80), 6, **THREE),
    "window longer than the width, pretrained windows": Case((80, 16), 6, **THREE, pretrained=(6, 6, 3)),
    "window of two sides": Case((72, 60), (4, 7), **THREE),
    "map of 16x12 that window 5 doesn't divide": Case((64, 48), 5, depths=(2, 2), heads=(2, 4), embed_dim=32),
    "1x1 last stage": Case((32, 32), 4, **FOUR),
    "1x1 last stage, pretrained window 1": Case((32, 32), 4, **FOUR, pretrained=(4, 4, 2, 1)),
    "1x1 map before the last stage": Case((16, 16), 4, **FOUR),
    "192 with window 4, last map 6 (1536 with window 32)": Case((192, 192), 4, **LATE, pretrained=(3, 3, 3, 2)),
    "160 with window 10, no shift in stage 3 (640 with window 40)": Case((160, 160), 10, **LATE),
    "100 px, odd maps 25 and 13 and 7 at merging": Case((100, 100), 5, **FOUR),
    "37x50 px, not divisible by the patch": Case((37, 50), 4, **THREE),
    "made for 32, run at 48": Case((48, 48), 4, **THREE, built_for=(32, 32)),
    "made for 64, run at 16x32": Case((16, 32), 4, **THREE, built_for=(64, 64)),
    "extra norm counted in the stage": Case((32, 32), 4, (1, 7), (2, 4), 32, extra_norm_every=3),
    "extra norm counted through the model": Case(
        (32, 32), 4, (1, 7), (2, 4), 32, extra_norm_every=3, extra_norm_counter="model"
    ),
}

#: Sequential's limit splits the larger maps; tests/unit/models/test_attention.py splits everything.
BACKENDS = {
    "eager": {},
    "sdpa": {"attention": {"backend": "sdpa"}},
    "sequential": {"attention": {"backend": "sequential", "max_score_bytes": 65536}},
    "fused": {"attention": {"backend": "fused"}},
}


@cache
def defined(case: Case) -> Result:
    return definition_result(case)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs_fused if name == "fused" else ()) for name in BACKENDS]
)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_are_those_of_the_definition(name: str, backend: str) -> None:
    found = difference(our_result(CASES[name], **BACKENDS[backend]), defined(CASES[name]))
    assert found.output <= TOLERANCE, found
    assert found.gradient <= TOLERANCE, found


#: Stages and blocks, counted from zero. H has 18 blocks in its third stage, G 42; through the model the stages before
#: the third hold four blocks.
EXTRA_NORMS = {
    ("huge", "stage"): {(2, block) for block in (5, 11, 17)},
    ("huge", "model"): {(2, block) for block in (1, 7, 13)} | {(3, 1)},
    ("giant", "stage"): {(2, block) for block in (5, 11, 17, 23, 29, 35, 41)},
    ("giant", "model"): {(2, block) for block in (1, 7, 13, 19, 25, 31, 37)} | {(3, 1)},
}


@pytest.mark.parametrize(("variant", "counter"), EXTRA_NORMS)
def test_the_extra_norm_of_h_and_g_stands_after_every_sixth_block(variant: str, counter: str) -> None:
    with torch.device("meta"):
        model = create_model(f"swinv2_{variant}", extra_norm_counter=counter)
    found = {name.split(".norm3")[0] for name, _ in model.named_parameters() if ".norm3." in name}
    assert found == {f"layers.{stage}.blocks.{block}" for stage, block in EXTRA_NORMS[variant, counter]}


def test_the_two_ways_to_count_extra_norms_differ_and_so_does_having_none() -> None:
    stage, model = (CASES[f"extra norm counted {where}"] for where in ("in the stage", "through the model"))
    none = replace(stage, extra_norm_every=0)
    places = [
        {name.split(".norm3")[0] for name, _ in our_model(case).named_parameters() if ".norm3." in name}
        for case in (stage, model, none)
    ]
    assert places[0] == {"layers.1.blocks.2", "layers.1.blocks.5"}
    assert places[1] == {"layers.1.blocks.1", "layers.1.blocks.4"}
    assert places[2] == set()
