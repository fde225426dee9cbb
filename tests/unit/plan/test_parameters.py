"""The list of a model's parameters, against the model that is built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.model import VARIANTS
from swinv2_scale.plan.parameters import run_parameters
from swinv2_scale.tasks.simmim import SimMIM

CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART = CONFIGS / "quickstart" / "simmim.yaml"
COLOUR = (
    *("model.in_channels=3", "data.pixel_mean=[0.5,0.5,0.5]", "data.pixel_std=[0.5,0.5,0.5]"),
    *("model.image_size=192", "model.window_size=12", "task.mask_patch_size=32"),
)


def built(path: Path, *overrides: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(planned, real) shapes by name."""
    config = load_config(path, list(overrides)).config
    with torch.device("meta"):
        model = SimMIM(config)
    return run_parameters(config), {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_a_run_is_known_by_name_and_shape(variant):
    shape = VARIANTS[variant]
    overrides = [f"model.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in shape.items()]
    planned, real = built(QUICKSTART, *COLOUR, f"model.variant={variant}", *overrides)
    assert planned == real


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.num_classes=7",),
        ("model.mlp_ratio=2.3",),
        ("model.patch_size=2",),
        ("model.extra_norm_every=2", "model.extra_norm_counter=model", "model.depths=[3, 3]"),
    ],
    ids=str,
)
def test_so_is_every_parameter_of_odd_models(overrides):
    planned, real = built(QUICKSTART, *overrides)
    assert planned == real


def test_simmim_of_giant_has_its_three_billion_and_the_pixel_head():
    path = CONFIGS / "stages" / "giant" / "simmim_192w12.yaml"
    numbers = sum(math.prod(shape) for shape in run_parameters(load_config(path).config).values())
    # A mask token of 512, and a Linear from 4096 to 32 x 32 pixels of three channels.
    assert numbers == 2_997_843_680 + 512 + (4096 + 1) * 32 * 32 * 3
