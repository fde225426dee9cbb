"""load_weights and save_weights, and the account of every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swinv2_scale.config.model import VARIANTS, ModelConfig, PretrainedWindows
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.names import FORMAT_NAMES, Format
from swinv2_scale.weights.read import Weights, open_weights
from swinv2_scale.weights.transfer import adapt_channels, inherit_windows, read_head_map
from swinv2_scale.weights.write import write_weights

Head = Literal["auto", "keep", "new"]

#: What a pre-training model puts before the backbone's names.
BACKBONE = "encoder."


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, of the file and of the model."""

    where: str
    style: Format
    #: Of the model: taken as they are.
    loaded: tuple[str, ...]
    #: Of the model: made out of the file's, and how.
    derived: Mapping[str, str]
    #: Of the model: kept their first values, and why.
    new: Mapping[str, str]
    #: Of the file: not used, and why.
    dropped: Mapping[str, str]
    pretrained_window_sizes: PretrainedWindows
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = (
            f"{len(self.loaded)} loaded, {len(self.derived)} derived, {len(self.new)} new, {len(self.dropped)} dropped"
        )
        lines = [f"{self.where} ({FORMAT_NAMES[self.style]}): {counts}"]
        for what, names in (("derived", self.derived), ("new", self.new), ("dropped", self.dropped)):
            reasons: dict[str, list[str]] = {}
            for name, reason in names.items():
                reasons.setdefault(reason, []).append(name)
            for reason, group in reasons.items():
                shown = ", ".join(group[:3]) + (f", .. ({len(group)})" if len(group) > 3 else "")
                lines.append(f"  {what}: {shown}: {reason}")
        lines.append(f"  pretrained windows: {list(self.pretrained_window_sizes)}")
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class Loading:
    """A checked plan: nothing of it can fail for a name or a shape."""

    report: LoadReport
    #: The model's configuration with the pretrained windows that it now has.
    config: ModelConfig
    _weights: Weights
    _head_rows: Tensor | None = None

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, whole tensor as the file has it), one at a time.

        Raises:
            WeightsError: a tensor holds NaN or infinity.
        """
        for name in (*self.report.loaded, *self.report.derived):
            backbone_name = name.removeprefix(BACKBONE)
            value = self._weights.tensor(backbone_name)
            if not bool(value.isfinite().all()):
                raise WeightsError(f"{self._weights.where}: {name} holds NaN or infinity", "take an earlier checkpoint")
            if backbone_name == "patch_embed.proj.weight":
                wanted = self.config.in_channels
                value = value if value.shape[1] == wanted else adapt_channels(value, wanted)
            elif self._head_rows is not None and backbone_name.startswith("head."):
                value = value[self._head_rows]
            yield name, value


def load_weights(
    model: nn.Module, path: str | Path, *, head: Head = "auto", head_map: str | Path | None = None
) -> LoadReport:
    """Load anyone's Swin V2 weights into a model of create_model, at any image size and window.

    Args:
        path: Microsoft's .pth, a Hugging Face folder or safetensors, timm's, torchvision's or our file; detected.
        head: ``auto`` keeps a class head of the same size and starts a new one otherwise, ``keep`` insists, ``new``
            always starts a new one.
        head_map: a text file that says for each of the model's classes which of the file's it is (map22kto1k.txt).

    Returns:
        What became of every tensor; print it.

    Raises:
        WeightsError: damaged, unsafe, or another model; names the first differing keys. The model is unchanged, except
            where a tensor turns out to hold NaN half-way.
    """
    return load_into(model, open_weights(path), head=head, head_map=head_map)


def load_into(
    model: nn.Module, weights: Weights, *, head: Head = "auto", head_map: str | Path | None = None
) -> LoadReport:
    """load_weights for weights that are open already."""
    parameters = dict(model.named_parameters())
    backbone: Any = getattr(model, BACKBONE.rstrip("."), model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    loading = plan_loading(weights, shapes, backbone.config, head=head, head_map=head_map)
    with torch.no_grad():
        for name, value in loading.values():
            parameters[name].copy_(value)
    backbone.inherit_pretrained_windows(loading.report.pretrained_window_sizes)
    return loading.report


def save_weights(
    model: nn.Module, path: str | Path, format: Format = "native", *, facts: Facts | None = None
) -> tuple[str, ...]:
    """Save a model in anyone's format; loading it back gives the same bits.

    Args:
        path: a folder for ``hf``, else a file ending with .safetensors or .pth.
        format: hf | timm | microsoft | torchvision | native.
        facts: how its images are normalised, and its class names; ImageNet's mean and deviation where it is silent.

    Returns:
        What was left out, as sentences; nothing that changes the numbers ever is.

    Raises:
        WeightsError: the format can't hold this model; says why.
        OutputError: it can't be written, or something is there already.
    """
    backbone: Any = getattr(model, BACKBONE.rstrip("."), model)
    return write_weights(weights_of(model, backbone.config, facts or Facts()), Path(path), format)


def weights_of(model: nn.Module, config: ModelConfig, facts: Facts) -> Weights:
    """A live model's parameters as named tensors."""
    tensors = {name.removeprefix(BACKBONE): p.detach() for name, p in model.named_parameters()}
    metas = {name: tensor.to("meta") for name, tensor in tensors.items()}
    fields = config.settled.model_dump(exclude={"attention"})
    said = Facts(fields, facts.pixel_mean, facts.pixel_std, facts.labels)
    return Weights("the model", "native", said, metas, lambda name: tensors[name].cpu(), {})


def plan_loading(
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    *,
    head: Head = "auto",
    head_map: str | Path | None = None,
) -> Loading:
    """Decide for every tensor of the file and of the model; reads next to nothing.

    Args:
        shapes: whole shapes of the model's parameters, by name.

    Raises:
        WeightsError: the file is of another model.
    """
    loaded: list[str] = []
    derived: dict[str, str] = {}
    new: dict[str, str] = {}
    differing: list[str] = []
    head_rows: Tensor | None = None
    for name, shape in shapes.items():
        key = name.removeprefix(BACKBONE)
        found = tuple(weights.metas[key].shape) if key in weights.metas else None
        if key.startswith("head."):
            if found is None or head == "new" or (found != shape and head == "auto" and head_map is None):
                new[name] = "the file has no head" if found is None else _why_new_head(head, found, shape)
            elif head_map is not None:
                head_rows = read_head_map(head_map, found[0], shape[0])
                derived[name] = f"rows of {found[0]} classes picked by {head_map}"
            else:
                (loaded if found == shape else differing).append(name)
        elif found == shape:
            loaded.append(name)
        elif (
            key == "patch_embed.proj.weight"
            and found
            and found[1] == 3
            and (found[0], *found[2:]) == (shape[0], *shape[2:])
        ):
            how = "summed over RGB" if shape[1] == 1 else f"RGB in turn, times 3/{shape[1]}"
            derived[name] = f"3 channels to {shape[1]}: {how}"
        elif key == "mask_token" and found is None:
            new[name] = "the file is of no pre-training"
        elif key.startswith("decoder.") and (found is None or found[0] != shape[0]):
            new[name] = "the file is of no pre-training" if found is None else "it predicts other pixels"
        else:
            differing.append(name)
    unused = [key for key in weights.metas if key not in {name.removeprefix(BACKBONE) for name in shapes}]
    strange = [key for key in unused if not key.startswith(("head.", "decoder.")) and key != "mask_token"]
    if differing or strange:
        raise _another_model(weights, shapes, config, differing, strange)
    config, warnings = inherit_windows(config, weights.trained_windows, weights.where)
    dropped = {**weights.dropped, **dict.fromkeys(unused, "the model has no such part")}
    if "mask_token" in {name.removeprefix(BACKBONE) for name in loaded}:
        warnings += _zero_token_warning(weights)
    windows = config.pretrained_window_sizes or ()
    report = LoadReport(weights.where, weights.style, tuple(loaded), derived, new, dropped, windows, warnings)
    return Loading(report, config, weights, head_rows)


def _why_new_head(head: Head, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return (
        "a new head was asked for" if head == "new" else f"the file's head has {found[0]} classes, the model {shape[0]}"
    )


def _zero_token_warning(weights: Weights) -> tuple[str, ...]:
    if bool(weights.tensor("mask_token").any()):
        return ()
    return (
        "the mask token is all zeros, as Hugging Face starts it: through the cosine attention its first gradient can "
        "reach 1e17. Trained mask tokens aren't zero; was this model pre-trained?",
    )


def _another_model(
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    differing: list[str],
    strange: list[str],
) -> WeightsError:
    fields = weights.model_fields
    lines = [f"{weights.where} is of another model than this {describe(config.model_dump())}:"]
    for name in differing[:4]:
        meta = weights.metas.get(name.removeprefix(BACKBONE))
        found = "not in the file" if meta is None else f"{tuple(meta.shape)} in the file"
        lines.append(f"  {name}: {found}, {shapes[name]} in the model")
    lines += [f"  {name}: {tuple(weights.metas[name].shape)} in the file, not in the model" for name in strange[:4]]
    more = len(differing) + len(strange) - (len(lines) - 1)
    lines += [f"  and {more} more"] if more else []
    lines.append(f"the file seems to be a {describe(fields)}")
    return WeightsError("\n".join(lines), "create the model with those values, or give other weights")


def describe(fields: Mapping[str, Any]) -> str:
    """One line about a model's shape."""
    parts = [
        f"{key} {list(v) if isinstance(v := fields[key], tuple) else v}" for key in ("embed_dim", "depths", "num_heads")
    ]
    if fields.get("extra_norm_every"):
        parts.append(f"extra_norm_every {fields['extra_norm_every']}")
    is_named = all(fields[key] == value for key, value in VARIANTS.get(fields["variant"], {"embed_dim": 0}).items())
    return f"{'swinv2_' + fields['variant'] if is_named else 'Swin V2'} ({', '.join(parts)})"
