"""Hugging Face's config.json and preprocessor_config.json of a Swin V2, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.source import as_tuples
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights.facts import Facts

_BICUBIC = 3


def facts_of_json(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], shapes: Mapping[str, Any], where: str
) -> Facts:
    """config.json, and preprocessor_config.json where there is one.

    Args:
        shapes: the fields of ModelConfig that the tensors' shapes fix.

    Raises:
        WeightsError: another model, an option that Swin V2 as published doesn't have, or not what the tensors are.
    """
    fixed = {"model_type": "swinv2", "hidden_act": "gelu", "use_absolute_embeddings": False, "qkv_bias": True}
    fixed |= {"layer_norm_eps": 1e-5, **{key: shapes[key] for key in ("embed_dim", "depths", "num_heads")}}
    for key, needed in fixed.items():
        found = as_tuples(config.get(key, None if key == "model_type" else needed))
        if found != needed:
            raise WeightsError(
                f"{where}: {key} is {found!r} in config.json, these tensors are of a Swin V2 with {needed!r}",
                "give the config.json of these weights",
            )
    try:
        windows = as_tuples(config.get("pretrained_window_sizes") or [])
        fields = {key: as_tuples(config[key]) for key in ("image_size", "window_size")}
        names = config.get("id2label") or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        mean, std = (_of_channels(preprocessor.get(key), shapes["in_channels"]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        keys = "image_size, window_size, pretrained_window_sizes, id2label; image_mean, image_std"
        raise WeightsError(f"{where}: config.json and preprocessor_config.json ({keys}): {error!r}") from None
    fields |= {"drop_path_rate": config.get("drop_path_rate", 0.0)}
    if windows and (not isinstance(windows, tuple) or any(windows)):
        fields["pretrained_window_sizes"] = windows
    has_names = any(label != f"LABEL_{number}" for number, label in enumerate(labels))
    return Facts(fields, mean, std, labels if has_names else None)


def _of_channels(value: Any, in_channels: int) -> tuple[float, ...] | None:
    """One number for all channels, or one each."""
    if value is None:
        return None
    values = tuple(float(v) for v in value) if isinstance(value, list) else (float(value),) * in_channels
    if len(values) != in_channels:
        raise ValueError(f"{len(values)} numbers for {in_channels} channels")
    return values


def config_json(config: ModelConfig, facts: Facts, architecture: str, dtype: str) -> dict[str, Any]:
    """config.json for one of Hugging Face's classes.

    Args:
        config: square, with settled pretrained windows.
        architecture: Swinv2Model, Swinv2ForImageClassification or Swinv2ForMaskedImageModeling.
        dtype: of the tensors; its loader casts to it.
    """
    names = facts.labels or tuple(f"LABEL_{number}" for number in range(config.num_classes))
    classes: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return {
        "architectures": [architecture],
        "model_type": "swinv2",
        "dtype": dtype,
        "image_size": config.image_shape[0],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "hidden_size": config.stage_dims[-1],
        "window_size": config.window_shape[0],
        "pretrained_window_sizes": list(config.pretrained_window_sizes or ()),
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path_rate,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_absolute_embeddings": False,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "encoder_stride": config.stride,
        **(classes if config.num_classes else {}),
    }


def preprocessor_json(config: ModelConfig, facts: Facts) -> dict[str, Any]:
    """preprocessor_config.json: resize to the model's size, scale to 0..1, normalise."""
    mean, std = facts.normalisation(config.in_channels)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_shape[0], "width": config.image_shape[1]},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
