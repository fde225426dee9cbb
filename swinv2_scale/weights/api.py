"""load_weights and save_weights, and the account of every key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swinv2_scale.config.head_map import read_head_map
from swinv2_scale.config.model import EXECUTION_FIELDS, VARIANTS, ModelConfig, PretrainedWindows
from swinv2_scale.config.source import format_value
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.names import FORMAT_NAMES, Format
from swinv2_scale.weights.read import Weights, open_weights
from swinv2_scale.weights.transfer import adapt_channels, inherit_windows
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
    #: Class names and normalisation that the file knows; save_weights(facts=) keeps them.
    facts: Facts = field(default_factory=Facts)

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

    def fingerprint(self) -> str:
        """Read all that will be used once; the same for the same bits, wherever they are read.

        Raises:
            WeightsError: a tensor holds NaN or infinity.
        """
        digest = hashlib.sha256(str(self.report.pretrained_window_sizes).encode())
        for name in (*self.report.loaded, *self.report.derived):
            value = self._weights.tensor(name.removeprefix(BACKBONE)).contiguous()
            if not bool(value.isfinite().all()):
                raise WeightsError(f"{self._weights.where}: {name} holds NaN or infinity", "take an earlier checkpoint")
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.itemsize, torch.uint8)
            digest.update(f"{name} {value.view(integers).sum(dtype=torch.int64).item()}".encode())
        return digest.hexdigest()

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, whole tensor as the file has it), one at a time.

        Raises:
            WeightsError: the file can't be read any more.
        """
        for name in (*self.report.loaded, *self.report.derived):
            key = name.removeprefix(BACKBONE)
            value = self._weights.tensor(key)
            if key == "patch_embed.proj.weight" and value.shape[1] != self.config.in_channels:
                value = adapt_channels(value, self.config.in_channels)
            elif self._head_rows is not None and key.startswith("head."):
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
        WeightsError: damaged, unsafe, or another model; names the first differing keys. The model is unchanged then.
    """
    return load_into(model, open_weights(path), head=head, head_map=head_map)


def load_into(
    model: nn.Module, weights: Weights, *, head: Head = "auto", head_map: str | Path | None = None
) -> LoadReport:
    """load_weights for weights that are open already."""
    if head not in ("auto", "keep", "new"):
        raise WeightsError(f"head={head!r} is none of auto, keep, new")
    model, backbone = _parts(model)
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise WeightsError("the model is on the meta device and has no values", 'first model.to_empty(device="cpu")')
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    config = backbone.config
    if not backbone.windows_are_given:  # those of weights that were loaded before don't count
        config = config.model_copy(update={"pretrained_window_sizes": None})
    loading = plan_loading(weights, shapes, config, head=head, head_map=head_map)
    loading.fingerprint()
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
        facts: how its images are normalised, and its class names: ``report.facts`` of load_weights keeps what a file
            said. ImageNet's mean and deviation where it is silent.

    Returns:
        What was left out, as sentences; nothing that changes the numbers ever is.

    Raises:
        WeightsError: the format can't hold this model; says why.
        OutputError: it can't be written, or something is there already.
    """
    model, backbone = _parts(model)
    return write_weights(weights_of(model, backbone.config, facts or Facts()), Path(path), format)


def _parts(model: nn.Module) -> tuple[nn.Module, Any]:
    """A model without torch's wrappers around it, and its backbone."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    backbone: Any = getattr(model, BACKBONE.rstrip("."), model)
    if not isinstance(getattr(backbone, "config", None), ModelConfig):
        raise WeightsError(f"a {type(model).__name__} is no model of create_model", "make one, and load into that")
    return model, backbone


def weights_of(model: nn.Module, config: ModelConfig, facts: Facts) -> Weights:
    """A live model's parameters as named tensors."""
    tensors = {name.removeprefix(BACKBONE): p.detach() for name, p in model.named_parameters()}
    metas = {name: tensor.to("meta") for name, tensor in tensors.items()}
    fields = config.settled.model_dump(exclude=EXECUTION_FIELDS)
    said = replace(facts, model=fields)
    return Weights("the model", "native", said, metas, lambda name: tensors[name].cpu(), {})


def require_head(weights: Weights, num_classes: int | None = None) -> None:
    """
    Args:
        num_classes: how many classes it has to have; None: any number.

    Raises:
        WeightsError: the weights have no class head, or one of other classes.
    """
    found = weights.shape_fields["num_classes"]
    if not found:
        raise WeightsError(
            f"{weights.where} has no class head, it was pre-trained without labels: it can't tell classes apart",
            "fine-tune it first (launch/finetune.py), or see what its features know: swinv2-scale probe",
        )
    if num_classes is not None and found != num_classes:
        raise WeightsError(
            f"{weights.where} has a head of {found} classes, model.num_classes is {num_classes}",
            f"set model.num_classes={found} if the data set has as many, or give other weights",
        )


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
    ours = {name.removeprefix(BACKBONE): name for name in shapes}
    loaded: list[str] = []
    derived: dict[str, str] = {}
    new: dict[str, str] = {}
    differing: list[str] = []
    head_part, head_reason, head_rows = _plan_head(weights, shapes.get(ours.get("head.weight", "")), head, head_map)
    for key, name in ours.items():
        shape, found = shapes[name], tuple(weights.metas[key].shape) if key in weights.metas else None
        if key.startswith("head."):
            if head_part == "loaded":
                loaded.append(name)
            else:
                (derived if head_part == "derived" else new)[name] = head_reason
        elif found == shape:
            loaded.append(name)
        elif (
            key == "patch_embed.proj.weight" and found and (found[0], 3, *found[2:]) == (shape[0], found[1], *shape[2:])
        ):
            how = "summed over RGB" if shape[1] == 1 else f"RGB in turn, times 3/{shape[1]}"
            derived[name] = f"3 channels to {shape[1]}: {how}"
        elif found is None and key.startswith(("mask_token", "decoder.")):
            new[name] = "the file is of no pre-training"
        elif found and key.startswith("decoder.") and found[0] != shape[0]:
            new[name] = "the file's predicts other pixels"
        else:
            differing.append(name)
    unused = {key: "the model has no such part" for key in weights.metas if key not in ours}
    strange = [key for key in unused if not key.startswith(("head.", "decoder.")) and key != "mask_token"]
    if differing or strange:
        raise _another_model(weights, shapes, config, differing, strange)
    config, warnings = inherit_windows(config, weights.trained_windows, weights.where)
    replaced = {key: new[name] for key, name in ours.items() if name in new and key in weights.metas}
    if "mask_token" in weights.metas and "mask_token" in ours:
        warnings += _zero_token_warning(weights)
    report = LoadReport(
        weights.where,
        weights.style,
        tuple(loaded),
        derived,
        new,
        {**weights.dropped, **unused, **replaced},
        config.pretrained_window_sizes or (),
        warnings,
        weights.facts,
    )
    return Loading(report, config, weights, head_rows)


def _plan_head(
    weights: Weights, shape: tuple[int, ...] | None, head: Head, head_map: str | Path | None
) -> tuple[Literal["loaded", "derived", "new"], str, Tensor | None]:
    """What becomes of the class head, why, and which rows of the file's it takes.

    Args:
        shape: of the model's head; None where it has none.

    Raises:
        WeightsError: what is asked for can't be.
    """
    found = tuple(weights.metas["head.weight"].shape) if "head.weight" in weights.metas else None
    if head_map is not None:
        if found is None or shape is None or head == "new":
            missing = "the file has no head" if found is None else "the model has no head" if shape is None else ""
            why = missing or "a new head is asked for"
            raise WeightsError(f"a head map is given for {weights.where}, but {why}", "leave out the head map")
        rows = torch.tensor(read_head_map(head_map, found[0], shape[0]))
        return "derived", f"rows of {found[0]} classes picked by {head_map}", rows
    if head == "keep" and (shape is None or found != shape):
        theirs, ours = (f"a head of {s[0]} classes" if s else "no head" for s in (found, shape))
        raise WeightsError(
            f"the head is to be kept, but {weights.where} has {theirs}, the model {ours}",
            "ask for head auto or new, or give a head map (task.init_head, task.init_head_map in a configuration)",
        )
    if head == "new" or found is None or shape is None:
        return "new", "a new head was asked for" if found else "the file has no head", None
    if found[0] != shape[0]:
        return "new", f"the file's head has {found[0]} classes, the model's {shape[0]}", None
    return "loaded", "", None


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
    lines = [f"{weights.where} is of another model than this {describe(config.model_dump())}:"]
    for name in differing[:4]:
        meta = weights.metas.get(name.removeprefix(BACKBONE))
        found = "not in the file" if meta is None else f"{tuple(meta.shape)} in the file"
        lines.append(f"  {name}: {found}, {shapes[name]} in the model")
    lines += [f"  {name}: {tuple(weights.metas[name].shape)} in the file, not in the model" for name in strange[:4]]
    more = len(differing) + len(strange) - (len(lines) - 1)
    lines += [f"  and {more} more"] if more else []
    theirs, ours = weights.model_fields, config.model_dump()
    adaptable = {"variant", "num_classes"} | ({"in_channels"} if theirs["in_channels"] == 3 else set())
    fields = [key for key in weights.shape_fields if key not in adaptable and theirs[key] != ours[key]]
    lines.append(f"the file seems to be a {describe(theirs)}")
    values = ", ".join(f"{key} {format_value(theirs[key])}" for key in fields)
    return WeightsError("\n".join(lines), f"create the model with {values or 'its values'}, or give other weights")


def describe(fields: Mapping[str, Any]) -> str:
    """One line about a model's shape."""
    parts = [f"{key} {format_value(fields[key])}" for key in ("embed_dim", "depths", "num_heads")]
    if fields.get("extra_norm_every"):
        parts.append(f"extra_norm_every {fields['extra_norm_every']}")
    is_named = all(fields[key] == value for key, value in VARIANTS.get(fields["variant"], {"embed_dim": 0}).items())
    return f"{'swinv2_' + fields['variant'] if is_named else 'Swin V2'} ({', '.join(parts)})"
