"""Parameter groups and the schedule."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.config.run import OptimConfig
from swinv2_scale.engine.optim import build_optimizer, learning_rate
from swinv2_scale.models.factory import create_model
from swinv2_scale.plan.parameters import backbone_parameters, is_decayed, layer_numbers, parameter_groups


def released_layer(name: str, depths: tuple[int, ...]) -> int:
    """The rule of the released code's fine-tuning, stated with the depths and no regular expression."""
    parts = name.removeprefix("encoder.").split(".")
    if parts[0] in ("mask_token", "patch_embed"):
        return 0
    if parts[0] == "layers":
        stage = int(parts[1])
        before = sum(depths[:stage])
        return before + int(parts[3]) + 1 if parts[2] == "blocks" else before + depths[stage]
    assert parts[0] in ("norm", "head", "decoder"), name
    return sum(depths) + 1


def shapes_of(variant: str) -> dict[str, tuple[int, ...]]:
    return dict(backbone_parameters(ModelConfig(variant=variant, num_classes=10, **VARIANTS[variant])))


# Layers


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("variant", ["tiny", "giant"])
def test_every_parameter_has_the_layer_of_the_released_code(variant: str, prefix: str) -> None:
    names = ["mask_token", "decoder.0.weight", *(prefix + name for name in shapes_of(variant))]
    depths = tuple(VARIANTS[variant]["depths"])
    assert layer_numbers(names) == {name: released_layer(name, depths) for name in names}


def test_the_layers_of_some_parameters_by_hand() -> None:
    layers = layer_numbers(shapes_of("tiny"))  # 2, 2, 6 and 2 blocks
    assert layers["patch_embed.norm.bias"] == 0
    assert layers["layers.0.blocks.0.attn.logit_scale"] == 1
    assert layers["layers.0.downsample.reduction.weight"] == layers["layers.0.blocks.1.norm2.bias"] == 2
    assert layers["layers.1.blocks.0.mlp.fc1.weight"] == 3
    assert layers["layers.2.downsample.norm.weight"] == layers["layers.2.blocks.5.attn.qkv.weight"] == 10
    assert layers["layers.3.blocks.1.norm1.weight"] == 12
    assert layers["norm.weight"] == layers["head.bias"] == 13


def test_layers_do_not_depend_on_the_order_of_the_names() -> None:
    names = list(shapes_of("giant"))
    assert layer_numbers(reversed(names)) == layer_numbers(names)


def test_giant_has_52_layers_and_its_embedding_learns_with_eight_ten_thousandths_of_the_rate() -> None:
    groups = parameter_groups(shapes_of("giant"), by_layer=True)
    assert {group.layers_above for group in groups} == set(range(52))
    embedding = next(group for group in groups if "patch_embed.proj.weight" in group.names)
    assert 0.87**embedding.layers_above == pytest.approx(8.2e-4, rel=0.01)  # known to two digits


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("variant", ["tiny", "giant"])
def test_groups_hold_every_parameter_once_with_its_own_decay_and_layer(variant: str, by_layer: bool) -> None:
    shapes = shapes_of(variant)
    groups = parameter_groups(shapes, by_layer)
    assert sorted(name for group in groups for name in group.names) == sorted(shapes)
    last = sum(VARIANTS[variant]["depths"]) + 1
    for group in groups:
        for name in group.names:
            assert group.is_decayed == is_decayed(name, shapes[name])
            above = last - released_layer(name, VARIANTS[variant]["depths"]) if by_layer else 0
            assert group.layers_above == above
    kinds = [(group.layers_above, group.is_decayed) for group in groups]
    assert len(set(kinds)) == len(kinds)
    assert kinds == [(0, True), (0, False)] or by_layer


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_the_optimizer_trains_every_parameter_with_the_rate_of_its_layer(layer_decay: float) -> None:
    with torch.device("meta"):
        model = create_model("swinv2_tiny", num_classes=7)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    optim = OptimConfig(lr=1e-3, total_steps=10, layer_decay=layer_decay, weight_decay=0.1)
    optimizer = build_optimizer(model, shapes, optim)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(shapes)
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        expected = layer_decay ** (13 - released_layer(name, (2, 2, 6, 2)))
        assert group["lr_scale"] == pytest.approx(expected, rel=1e-12)  # two ways to write one power
        assert group["weight_decay"] == (0.1 if is_decayed(name, parameter.shape) else 0)


# Weight decay


def test_decay_spares_vectors_biases_the_bias_mlp_and_logit_scales() -> None:
    with torch.device("meta"):
        model = create_model("swinv2_tiny")
    decayed = {name for name, p in model.named_parameters() if is_decayed(name, p.shape)}
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()) for name in decayed}
    assert kinds == {
        "patch_embed.proj.weight",
        "layers.blocks.attn.qkv.weight",
        "layers.blocks.attn.proj.weight",
        "layers.blocks.mlp.fc1.weight",
        "layers.blocks.mlp.fc2.weight",
        "layers.downsample.reduction.weight",
    }
    assert not is_decayed("mask_token", torch.Size((1, 1, 96)))


# Schedules


def rates_of(config: OptimConfig, scheduler: type, **settings) -> list[float]:
    """What torch's scheduler makes of ``lr`` at every step of the training."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], config.lr)
    schedule = scheduler(optimizer, **settings)
    found = []
    for _ in range(config.total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def ours(config: OptimConfig) -> list[float]:
    return [learning_rate(step, config) for step in range(config.total_steps)]


# torch multiplies from step to step: its rounding errors add up.
CLOSE = {"rel": 1e-9}


def test_a_line_is_torchs() -> None:
    config = OptimConfig(lr=0.3, total_steps=40, min_lr=0.06, schedule="linear")
    expected = rates_of(config, lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.2, total_iters=40)
    assert ours(config) == pytest.approx(expected, **CLOSE)


def test_a_cosine_is_torchs() -> None:
    config = OptimConfig(lr=0.3, total_steps=40, min_lr=0.06)
    expected = rates_of(config, lr_scheduler.CosineAnnealingLR, T_max=40, eta_min=0.06)
    assert ours(config) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("milestones", [(1,), (10, 11, 39), (5, 20)])
def test_steps_are_torchs(milestones: tuple[int, ...]) -> None:
    config = OptimConfig(lr=0.3, total_steps=40, schedule="multistep", milestones=milestones, gamma=0.25)
    expected = rates_of(config, lr_scheduler.MultiStepLR, milestones=milestones, gamma=0.25)
    assert ours(config) == pytest.approx(expected, **CLOSE)


def test_a_milestone_counts_from_its_own_step_on() -> None:
    config = OptimConfig(lr=1.0, total_steps=40, schedule="multistep", milestones=(10, 20))
    found = [learning_rate(step, config) for step in (9, 10, 19, 20, 39, 40, 4000)]
    assert found == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])


def test_steps_do_not_go_below_the_smallest_rate() -> None:
    config = OptimConfig(lr=1.0, total_steps=40, schedule="multistep", milestones=(10, 20, 30), min_lr=0.05)
    assert [learning_rate(step, config) for step in (0, 10, 20, 30)] == pytest.approx([1, 0.1, 0.05, 0.05])


SCHEDULES = {"linear": (), "cosine": (), "multistep": (10, 20)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_follows_the_same_warm_up(schedule: str) -> None:
    warm = OptimConfig(lr=1.0, total_steps=40, warmup_steps=8, warmup_lr=0.2)
    config = warm.model_copy(update={"schedule": schedule, "milestones": SCHEDULES[schedule]})
    # From one eighth of the way at the first update to the whole rate at the last one, and at the next.
    warm_up = [0.2 + 0.8 * (step + 1) / 8 for step in range(8)]
    assert ours(config)[:9] == pytest.approx([*warm_up, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 39])
def test_a_fall_ends_at_the_smallest_rate_after_the_last_step_and_stays_there(schedule: str, warmup_steps: int) -> None:
    config = OptimConfig(lr=1.0, total_steps=40, warmup_steps=warmup_steps, min_lr=0.1, schedule=schedule)
    assert learning_rate(warmup_steps, config) == 1.0
    if warmup_steps < 39:
        assert 0.1 < learning_rate(39, config) < 1.0
    for step in (40, 41, 10_000):
        assert learning_rate(step, config) == pytest.approx(0.1, **CLOSE)


def test_a_training_of_one_step_has_the_whole_rate() -> None:
    assert [learning_rate(0, OptimConfig(lr=0.5, total_steps=1, schedule=name)) for name in SCHEDULES] == [0.5] * 3


def test_the_rate_warms_up_in_a_line_and_falls_along_half_a_cosine() -> None:
    config = OptimConfig(lr=1.0, total_steps=110, warmup_steps=10, min_lr=0.2)
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.6)
    for step in range(10, 110):
        wanted = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert learning_rate(step, config) == pytest.approx(wanted)
    assert learning_rate(500, config) == pytest.approx(0.2)
