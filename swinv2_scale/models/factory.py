"""Models by name."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from swinv2_scale.config.loader import nearest_model_field
from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.config.rules import model_problems
from swinv2_scale.config.source import as_tuples
from swinv2_scale.errors import ConfigError, ConfigProblem
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.models.initialise import initial_values

_PREFIX = "swinv2_"


def list_models() -> list[str]:
    """The names that create_model takes."""
    return [_PREFIX + variant for variant in VARIANTS]


def create_model(name: str, *, seed: int = 0, **fields: Any) -> SwinV2:
    """Build a Swin V2 with initialised weights.

    Args:
        name: one of list_models().
        seed: what the weights are drawn from.
        fields: any field of ModelConfig: image_size, window_size, num_classes, depths, ...

    Raises:
        ConfigError: unknown name or field, or a value that doesn't fit.
    """
    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no model {name!r}{hint}", f"one of: {', '.join(list_models())}")
    unknown = [key for key in fields if key not in ModelConfig.model_fields or key == "variant"]
    if unknown:
        raise ConfigError(
            f"{name} cannot be built:",
            f"fields are: {', '.join(key for key in ModelConfig.model_fields if key != 'variant')}",
            tuple(
                ConfigProblem(key, "no such field", suggestion=nearest_model_field(key) if key != "variant" else "")
                for key in unknown
            ),
        )
    try:
        config = ModelConfig.model_validate({**as_tuples(fields), "variant": name.removeprefix(_PREFIX)})
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [ConfigProblem(".".join(map(str, e["loc"])), f"{e['input']!r}: {e['msg']}") for e in found]
        raise ConfigError(f"{name} cannot be built:", problems=tuple(problems)) from None
    problems = model_problems(config)
    if problems:
        raise ConfigError(f"{name} cannot be built:", problems=tuple(problems))
    model = SwinV2(config)
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter of an unpartitioned model its first value."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, {name: p.shape for name, p in parameters.items()}, seed):
        parameters[name].copy_(value)
