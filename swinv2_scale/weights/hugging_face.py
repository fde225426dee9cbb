"""Hugging Face's config.json and preprocessor_config.json of a Swin V2, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swinv2_scale.config.model import ModelConfig
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights.facts import Facts, as_tuples

_BICUBIC = 3


def facts_of_json(config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> Facts:
    """config.json, and preprocessor_config.json where there is one.

    Raises:
        WeightsError: another model, or a Swin V2 with an option that this project doesn't have.
    """
    if config.get("model_type") != "swinv2":
        raise WeightsError(f"{where}: config.json is of a {config.get('model_type')!r}, not of a swinv2")
    fixed = {"hidden_act": "gelu", "use_absolute_embeddings": False, "qkv_bias": True, "layer_norm_eps": 1e-5}
    for key, needed in fixed.items():
        if config.get(key, needed) != needed:
            raise WeightsError(f"{where}: {key} is {config[key]!r} in config.json; Swin V2 as published has {needed!r}")
    try:
        windows = [as_tuples(size) for size in config.get("pretrained_window_sizes") or []]
        fields = {
            "image_size": as_tuples(config["image_size"]),
            "window_size": as_tuples(config["window_size"]),
            "drop_path_rate": config.get("drop_path_rate", 0.0),
        }
    except KeyError as error:
        raise WeightsError(f"{where}: config.json lacks {error}") from None
    if any(windows):
        fields["pretrained_window_sizes"] = tuple(windows)
    names = config.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    has_names = any(label != f"LABEL_{number}" for number, label in enumerate(labels))
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    return Facts(
        fields, tuple(mean) if mean else None, tuple(std) if std else None, labels if has_names and labels else None
    )


def config_json(config: ModelConfig, facts: Facts, architecture: str) -> dict[str, Any]:
    """config.json for one of Hugging Face's classes.

    Args:
        config: square, with settled pretrained windows.
        architecture: Swinv2Model, Swinv2ForImageClassification or Swinv2ForMaskedImageModeling.
    """
    names = facts.labels or ()
    if len(names) != config.num_classes:
        names = tuple(f"LABEL_{number}" for number in range(config.num_classes))
    classes: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return {
        "architectures": [architecture],
        "model_type": "swinv2",
        "dtype": "float32",
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


def why_not(config: ModelConfig) -> str:
    """Why Hugging Face's model can't compute this one's numbers at its image size; empty where it can."""
    if len(set(config.image_shape)) > 1 or len(set(config.window_shape)) > 1:
        return (
            f"image {config.image_size} with window {config.window_size} isn't square, and its code takes the window "
            "and the shift of both axes from the height"
        )
    if any(isinstance(size, tuple) for size in config.pretrained_window_sizes or ()):
        return f"pretrained windows {config.pretrained_window_sizes} aren't square"
    for stage, (map_size, window) in enumerate(zip(config.stage_maps, config.stage_windows, strict=True)):
        if map_size[0] == 1 or (config.pretrained_window_sizes or ())[stage] == 1:
            return f"stage {stage} has a map or a pretrained window of one token, where its code divides by zero"
        if map_size[0] % window[0]:
            return (
                f"stage {stage}'s map of {map_size[0]} doesn't divide into windows of {window[0]}, and its code lets "
                "tokens attend to the padding"
            )
    return ""
