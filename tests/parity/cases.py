"""What is compared: small models of every shape, their random weights, and by how much two computations differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale.config.model import VARIANTS
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.models.factory import create_model

NUM_CLASSES = 5
LARGEST_LOGIT_SCALE = math.log(100.0)

#: Float64 rounds at 1.1e-16. Through up to 50 blocks of sums in another order, at multipliers of up to 100, that grows
#: to some 1e-14 in outputs and 1e-13 in gradients; one coordinate in float64 instead of float32 would be 1e-8.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """One model, and the size of the images that it is given."""

    image: tuple[int, int]
    window: int | tuple[int, int]
    depths: tuple[int, ...] = (2, 2)
    heads: tuple[int, ...] = (2, 4)
    embed_dim: int = 16
    patch: int = 4
    pretrained: tuple[int, ...] | None = None
    extra_norm_every: int = 0
    extra_norm_counter: str = "stage"
    #: The size that the model is made for, where the images have another one.
    built_for: tuple[int, int] | None = None
    #: Every temperature at its limit (not just some).
    all_at_clamp: bool = False

    @property
    def shape(self) -> dict[str, Any]:
        """In the words that timm, transformers and we have in common."""
        return {
            "patch_size": self.patch,
            "embed_dim": self.embed_dim,
            "depths": self.depths,
            "num_heads": self.heads,
            "window_size": self.window,
        }

    @property
    def model_image(self) -> tuple[int, int]:
        return self.built_for or self.image


@dataclass(frozen=True)
class Result:
    """What a model gives: the map of every stage (the last one normalised), pooled features, logits, gradients."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest relative difference over outputs and over gradients, and where it is."""

    output: float
    gradient: float
    worst_output: str
    worst_gradient: str


#: Heads of the first stage and channels a head. Later stages double the heads, as in every variant. Wide heads, as the
#: variants' own 32 channels, keep cosines of random vectors well-conditioned through dozens of blocks.
SMALL_WIDTHS = {
    "tiny": (3, 16),
    "small": (3, 12),
    "base": (1, 32),
    "large": (2, 16),
    "huge": (1, 24),
    "1b": (1, 28),
    "giant": (1, 32),
}


def variant_case(variant: str, window: int) -> Case:
    """A variant's depths at a small width: maps of 16, 8, 4 and 2 tokens a side."""
    heads, channels = SMALL_WIDTHS[variant]
    per_stage = tuple(heads * 2**stage for stage in range(4))
    return Case((64, 64), window, VARIANTS[variant]["depths"], per_stage, heads * channels)


def our_model(case: Case, **fields: Any) -> SwinV2:
    """In float64, with first values; ``fields`` are further fields of ModelConfig."""
    model = create_model(
        "swinv2_tiny",
        image_size=case.model_image,
        **case.shape,
        pretrained_window_sizes=case.pretrained,
        extra_norm_every=case.extra_norm_every,
        extra_norm_counter=case.extra_norm_counter,
        num_classes=NUM_CLASSES,
        **fields,
    )
    return model.double()


def random_weights(model: nn.Module, all_at_clamp: bool = False) -> dict[str, Tensor]:
    """Float64 values for every parameter, of sizes that let every part of a model matter.

    In blocks that are not shifted one head of four is exactly at the largest multiplier of 100 and one beyond it; the
    others are spread around the first value of training, and below 25: from 27 on the peers' masks of -100 may leak
    more than float64 rounds (test_disagreements.py), for scores within a window may differ by 2 * 27 + 16 then.

    The seed is one for which no temperature's gradient cancels much. It is a sum over all pairs of tokens of terms of
    both signs; where little is left of it, in one or a few of 75 comparisons with most other seeds, rounding is up to
    5e-12 of what is left. Outputs agree to 1e-13 with all of them.
    """
    generator = torch.Generator().manual_seed(21)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("logit_scale"):
            value = (math.log(10.0) + 0.5 * value).clamp(max=math.log(25.0))
            block = int(name.split(".")[-3])
            if block % 2 == 0:
                turn = (torch.arange(len(value)) + block // 2) % 4
                value[turn == 0] = LARGEST_LOGIT_SCALE
                value[turn == 1] = LARGEST_LOGIT_SCALE + 0.5
            if all_at_clamp:
                value = torch.full_like(value, LARGEST_LOGIT_SCALE)
        elif name.endswith("cpb_mlp.2.weight"):
            value = value * 3 / math.sqrt(value.shape[1])
        elif "cpb_mlp" in name or "token" in name:
            pass
        elif value.ndim > 1:
            value = value / math.sqrt(value[0].numel())
        else:
            is_branch = name.endswith(("norm1.weight", "norm2.weight"))
            value = (0.3 if is_branch else 1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * value
        weights[name] = value
    return weights


@lru_cache(maxsize=4)
def weights_of(case: Case) -> dict[str, Tensor]:
    """The random weights of a case. Shared: not to be changed."""
    with torch.device("meta"):
        model = our_model(case)
    return random_weights(model, case.all_at_clamp)


def our_random_model(case: Case, weights: dict[str, Tensor] | None = None, **fields: Any) -> SwinV2:
    """In float64, with random weights unless some are given."""
    with torch.device("meta"):
        model = our_model(case, **fields)
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights_of(case) if weights is None else weights)
    return model


def random_images(case: Case, count: int = 2) -> Tensor:
    """Normalised pixels."""
    return torch.randn(count, 3, *case.image, generator=torch.Generator().manual_seed(31), dtype=torch.float64)


def objective(logits: Tensor) -> Tensor:
    """A number to differentiate: a fixed random projection."""
    towards = torch.randn(logits.shape, generator=torch.Generator().manual_seed(22), dtype=torch.float64)
    return (logits * towards.to(logits.dtype)).sum()


def our_outputs(model: SwinV2, images: Tensor) -> dict[str, Tensor]:
    pyramid = model.forward_features_pyramid(images)
    outputs = {f"level {stage}": level for stage, level in enumerate(pyramid)}
    return {**outputs, "features": model.forward_features(images), "logits": model(images)}


def our_result(case: Case, **fields: Any) -> Result:
    """Ours, with random weights."""
    model = our_random_model(case, **fields)
    with torch.no_grad():
        pyramid = model.forward_features_pyramid(random_images(case))
    # One forward with gradients; the pyramid and the features are made of the same tokens.
    features = model.forward_features(random_images(case))
    assert model.head is not None
    logits = model.head(features)
    objective(logits).backward()
    outputs = {f"level {stage}": level for stage, level in enumerate(pyramid)}
    outputs |= {"features": features.detach(), "logits": logits.detach()}
    return Result(outputs, {name: _gradient(parameter) for name, parameter in model.named_parameters()})


def peer_result(model: nn.Module, outputs: dict[str, Tensor]) -> Result:
    """Differentiate a peer's logits."""
    objective(outputs["logits"]).backward()
    gradients = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
    return Result({name: x.detach() for name, x in outputs.items()}, gradients)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; nan where either is not finite, inf where only theirs is all zeros."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    largest = float((ours - theirs).abs().max())
    if largest == 0.0:
        return 0.0
    scale = float(theirs.abs().max())
    return largest / scale if scale else math.inf


def difference(ours: Result, theirs: Result) -> Difference:
    """Over the same names on both sides."""
    assert ours.outputs.keys() == theirs.outputs.keys()
    assert ours.gradients.keys() == theirs.gradients.keys()
    output = {name: relative_difference(x, theirs.outputs[name]) for name, x in ours.outputs.items()}
    gradient = {name: relative_difference(x, theirs.gradients[name]) for name, x in ours.gradients.items()}
    worst_output, worst_gradient = max(output, key=_rank(output)), max(gradient, key=_rank(gradient))
    return Difference(output[worst_output], gradient[worst_gradient], worst_output, worst_gradient)


def _rank(values: dict[str, float]) -> Any:
    return lambda name: math.inf if math.isnan(values[name]) else values[name]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
