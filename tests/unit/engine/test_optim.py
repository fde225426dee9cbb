"""Parameter groups and the schedule."""

import math

import pytest
import torch

from swinv2_scale.config.run import OptimConfig
from swinv2_scale.engine.optim import learning_rate
from swinv2_scale.models.factory import create_model
from swinv2_scale.plan.parameters import is_decayed


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


def test_the_rate_warms_up_in_a_line_and_falls_along_half_a_cosine() -> None:
    config = OptimConfig(lr=1.0, total_steps=110, warmup_steps=10, min_lr=0.2)
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.6)
    for step in range(10, 110):
        wanted = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert learning_rate(step, config) == pytest.approx(wanted)
    assert learning_rate(500, config) == pytest.approx(0.2)
