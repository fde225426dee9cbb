"""Every configuration in configs/ is valid and makes a model."""

import math
from pathlib import Path

import pytest
import torch

from swinv2_scale.config.loader import load_config, to_yaml
from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.engine.job import TASKS
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.tasks.simmim import SimMIMTask

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "recipes")

#: SwinV2-G without its head: 2,997,815,008, and 7 norms of 2 x 2048 on the main branch of its third stage.
GIANT = 2_997_815_008 + 7 * 2 * 2048

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(FOLDER).as_posix())


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def backbone_parameters(config: ModelConfig) -> int:
    """Counted by the paper's formulas, not by building anything."""
    total = config.in_channels * config.patch_size**2 * config.embed_dim + config.embed_dim + 2 * config.embed_dim
    for stage, depth in enumerate(config.depths):
        dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        hidden = int(dim * config.mlp_ratio)
        attention = 3 * dim * dim + 2 * dim + dim * dim + dim  # qkv without a key bias, output projection
        bias_mlp = 2 * 512 + 512 + 512 * heads
        mlp = dim * hidden + hidden + hidden * dim + dim
        norms = 2 * 2 * dim
        total += depth * (attention + bias_mlp + heads + mlp + norms)
        if config.extra_norm_every:
            total += depth // config.extra_norm_every * 2 * dim
        if stage + 1 < len(config.depths):
            total += 4 * dim * 2 * dim + 2 * 2 * dim
    return total + 2 * dim


def test_there_are_configurations_to_test():
    assert FOLDER / "quickstart" / "simmim.yaml" in CONFIGS


@every_config
def test_a_shipped_configuration_is_valid(path):
    assert load_config(path).path == path


@every_config
def test_a_shipped_configuration_resolves_to_yaml_that_reads_back(path, tmp_path):
    loaded = load_config(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(loaded), encoding="utf-8")
    assert load_config(resolved).config == loaded.config


@every_config
def test_the_model_of_a_shipped_configuration_can_be_built(path):
    config = load_config(path).config
    with torch.device("meta"):
        model = TASKS[config.task.name](config).build_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    # One linear layer from the last tokens to classes or, beside a mask token, to pixels.
    dim, outputs, added = config.model.stage_dims[-1], config.model.num_classes, 0
    if config.task.name == "simmim":
        outputs, added = config.model.stride**2 * config.model.in_channels, config.model.embed_dim
    added += dim * outputs + outputs
    assert num_parameters(model) == backbone_parameters(config.model) + added


@pytest.mark.parametrize("path", [path for path in CONFIGS if load_config(path).config.task.name == "simmim"])
def test_the_mask_covers_the_image_of_a_shipped_configuration(path):
    config = load_config(path).config
    units = SimMIMTask(config).units
    assert tuple(unit * config.task.mask_patch_size for unit in units) == config.model.image_shape
    assert 0 < math.ceil(config.task.mask_ratio * math.prod(units)) <= math.prod(units)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_parameters_that_the_formulas_count(variant):
    config = ModelConfig(variant=variant)
    with torch.device("meta"):
        model = SwinV2(config)
    assert num_parameters(model) == backbone_parameters(config)


def test_a_giant_of_the_default_shape_has_three_billion_parameters():
    giants = [ModelConfig(variant="giant")]
    giants += [c.model for c in (load_config(path).config for path in CONFIGS) if c.model.variant == "giant"]
    for config in (giant.model_copy(update={"num_classes": 0}) for giant in giants):
        same_shape = all(getattr(config, key) == value for key, value in VARIANTS["giant"].items())
        if not same_shape:
            continue
        with torch.device("meta"):
            model = SwinV2(config)
        assert num_parameters(model) == GIANT == 2_997_843_680
