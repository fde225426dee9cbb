"""Rules that span sections, and what a resumed run may change."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from swinv2_scale.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_BY_CONFIG
from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.run import EngineConfig, RunConfig, patterns_of
from swinv2_scale.config.tasks import ClassificationConfig, RandAugment, SimMIMConfig
from swinv2_scale.errors import ConfigProblem
from swinv2_scale.geometry import nearest_multiples

#: fixed: changing it would make another training; warn: allowed and said; free: allowed.
ResumePolicy = Literal["fixed", "warn", "free"]

#: By key or section, the longest match counts. Everything not named is fixed.
_RESUME_POLICY: dict[str, ResumePolicy] = {
    "model.attention": "warn",  # the same formula, another order of additions
    "model.linear": "warn",  # the same formula, another order of additions
    "model.compile": "warn",
    "model.drop_path_rate": "warn",
    "data.micro_batch_size": "warn",  # accumulation follows; only the order of additions changes
    "data.train": "free",  # what is in the shards counts, not where they lie: the manifest's digest is compared
    "data.validation": "free",
    "data.shards_dir": "free",
    "data.index_dir": "free",
    "data.remote": "free",
    "data.num_workers": "free",
    "data.prefetch_batches": "free",
    "data.prefetch_bytes": "free",
    "data.decoder": "warn",  # the same crops, pixels that differ a little
    "data.max_quarantined_share": "warn",
    "data.max_image_pixels": "warn",
    "optim.lr": "warn",
    "optim.min_lr": "warn",
    "optim.total_steps": "warn",  # stretches the schedule
    "optim.clip_grad_norm": "warn",
    "optim.weight_decay": "warn",
    "optim.ema_decay": "warn",
    "optim.layer_decay": "warn",
    "task.class_names": "free",
    "task.crop_pct": "free",
    "task.crop_mode": "free",
    "task.init_head": "free",  # a run with a checkpoint has its head
    "task.init_head_map": "free",
    "task.head_init_std": "free",
    "engine.precision": "warn",  # masters and moments are float32 in each
    "engine.zero_stage": "warn",  # the masters and moments are the same, cut elsewhere; the order of additions changes
    "engine.activation_checkpointing": "free",
    "engine.offload": "free",  # the same masters and moments, elsewhere
    "engine.offload.optimizer_states": "warn",  # DeepSpeed adds the gradient's norm up in another order
    "engine.overlap_comm": "free",
    "engine.reduce_bucket_elements": "warn",
    "engine.prefetch_bucket_elements": "free",
    "engine.param_persistence_elements": "free",
    "engine.max_live_elements": "free",
    "anomalies": "warn",  # which updates are taken from here on
    "init_from": "free",  # a run with a checkpoint doesn't read it
    "checkpoint": "free",
    "evaluation": "free",
    "logging": "free",
    "cluster": "free",
}


@dataclass(frozen=True)
class Change:
    """A key whose value differs between the saved run and the one that wants to go on."""

    key: str
    saved: Any
    asked: Any
    policy: ResumePolicy

    def __str__(self) -> str:
        verdict = {"fixed": "may not change", "warn": "may change, changes the numbers", "free": "may change"}
        return f"{self.key}: was {self.saved!r}, now {self.asked!r} - {verdict[self.policy]}"


def resume_policy(key: str) -> ResumePolicy:
    """What a resumed run may do with a key."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        policy = _RESUME_POLICY.get(".".join(parts[:length]))
        if policy:
            return policy
    return "fixed"


def changes(saved: dict[str, Any], asked: dict[str, Any]) -> list[Change]:
    """Compare two flat configurations (dotted keys); keys that only one side has count as None there."""
    return [
        Change(key, saved.get(key), asked.get(key), resume_policy(key))
        for key in dict.fromkeys((*saved, *asked))
        if saved.get(key) != asked.get(key)
    ]


def cross_section_problems(config: RunConfig) -> list[ConfigProblem]:
    """Everything that no single field can know. Each problem says which values would fit."""
    return [
        *model_problems(config.model),
        *_task_problems(config),
        *_data_problems(config),
        *_optim_problems(config),
        *_engine_problems(config),
        *_checkpoint_problems(config),
    ]


def model_problems(model: ModelConfig) -> list[ConfigProblem]:
    """Fields of a model that contradict each other."""
    problems = []
    per_stage = {
        "model.num_heads": model.num_heads,
        "model.pretrained_window_sizes": model.pretrained_window_sizes,
        "model.attention.backend": model.attention.backend if isinstance(model.attention.backend, tuple) else None,
    }
    for key, values in per_stage.items():
        if values is not None and len(values) != model.num_stages:
            message = f"has {len(values)} entries; model.depths {model.depths} makes {model.num_stages} stages"
            problems.append(ConfigProblem(key, message))
    for stage, (dim, heads) in enumerate(zip(model.stage_dims, model.num_heads, strict=False)):
        if dim % heads:
            fits = [n for n in range(1, dim + 1) if dim % n == 0]
            nearest = sorted(sorted(fits, key=lambda n: abs(n - heads))[:4])
            message = f"stage {stage} has width {dim}, which {heads} heads don't divide; near it {nearest} do"
            problems.append(ConfigProblem("model.num_heads", message))
    return problems + _window_problems(model)


def _window_problems(model: ModelConfig) -> list[ConfigProblem]:
    """A window longer than the whole first map would be clipped in every stage: nobody means that."""
    window, largest = max(model.window_shape), max(model.stage_maps[0])
    if window <= largest:
        return []
    fits = [n for n in range(1, largest + 1) if largest % n == 0]
    message = (
        f"{window} is larger than the first stage's whole map of {largest} tokens (image {model.image_size}, "
        f"patch {model.patch_size}); windows that fit: any up to {largest}, and {fits} divide it evenly; "
        f"or an image of {window * model.patch_size} px or more"
    )
    return [ConfigProblem("model.window_size", message)]


def _task_problems(config: RunConfig) -> list[ConfigProblem]:
    task = config.task
    problems = _simmim_problems(config.model, task) if isinstance(task, SimMIMConfig) else []
    if isinstance(task, ClassificationConfig):
        problems = _classification_problems(config, task)
    for key, (low, high) in (("task.crop_scale", task.crop_scale), ("task.crop_ratio", task.crop_ratio)):
        if low > high:
            problems.append(ConfigProblem(key, f"({low}, {high}) is (smallest, largest): the first exceeds the second"))
    if task.crop_scale[1] > 1:
        problems.append(ConfigProblem("task.crop_scale", f"{task.crop_scale[1]} is a share of the image, at most 1"))
    if config.evaluation.metric != "loss" and task.name == "simmim":
        message = f"{config.evaluation.metric} is no metric of simmim, loss is"
        problems.append(ConfigProblem("evaluation.metric", message))
    return problems


def _simmim_problems(model: ModelConfig, task: SimMIMConfig) -> list[ConfigProblem]:
    problems = []
    if task.mask_patch_size % model.patch_size:
        fits = nearest_multiples(task.mask_patch_size, model.patch_size)
        message = (
            f"{task.mask_patch_size} is not a multiple of model.patch_size {model.patch_size}; {_either(fits)} fit"
        )
        problems.append(ConfigProblem("task.mask_patch_size", message))
    unit = math.lcm(task.mask_patch_size, model.stride)
    for length in dict.fromkeys(model.image_shape):
        if length % unit:
            message = (
                f"{length} is not a multiple of {unit} (mask unit {task.mask_patch_size} px, encoder stride "
                f"{model.stride} px); {_either(nearest_multiples(length, unit))} fit"
            )
            problems.append(ConfigProblem("model.image_size", message))
    window = task.target_norm_window
    if window and (window % 2 == 0 or window == 1 or window > min(model.image_shape)):
        message = f"{window} must be odd, at least 3 and at most the image's {min(model.image_shape)} px"
        problems.append(ConfigProblem("task.target_norm_window", message))
    return problems


def _classification_problems(config: RunConfig, task: ClassificationConfig) -> list[ConfigProblem]:
    model, data, problems = config.model, config.data, []
    if model.num_classes < 2:
        message = f"{model.num_classes}: classification tells two classes or more apart; set it to the data set's"
        problems.append(ConfigProblem("model.num_classes", message))
    if task.aa is not None:
        try:
            RandAugment.of(task.aa)
        except ValueError as error:
            problems.append(ConfigProblem("task.aa", f"{task.aa!r}: {error}"))
        if data.pixel_type != "uint8" or model.in_channels not in (1, 3):
            message = (
                f"RandAugment changes images of 8 bits and 1 or 3 channels; data.pixel_type is {data.pixel_type}, "
                f"model.in_channels {model.in_channels}; set it to null"
            )
            problems.append(ConfigProblem("task.aa", message))
    if task.is_mixed and data.micro_batch_size % 2:
        message = (
            f"{data.micro_batch_size} is odd, task.mixup and task.cutmix mix pairs of neighbours; "
            "choose an even one, or set both to 0"
        )
        problems.append(ConfigProblem("data.micro_batch_size", message))
    if task.init_head_map is not None and task.init_head != "auto":
        message = f"a map picks rows of the old head, task.init_head is {task.init_head!r}; leave one of them out"
        problems.append(ConfigProblem("task.init_head_map", message))
    return problems


def _data_problems(config: RunConfig) -> list[ConfigProblem]:
    data, problems = config.data, []
    if data.global_batch_size % data.micro_batch_size:
        fits = [n for n in range(1, data.global_batch_size + 1) if data.global_batch_size % n == 0]
        nearest = sorted(sorted(fits, key=lambda n: abs(n - data.micro_batch_size))[:4])
        message = (
            f"{data.micro_batch_size} doesn't divide data.global_batch_size {data.global_batch_size}; {nearest} do"
        )
        problems.append(ConfigProblem("data.micro_batch_size", message))
    patterns = patterns_of(data.train)
    if data.train_weights is not None and len(data.train_weights) != len(patterns):
        message = f"has {len(data.train_weights)} weights, data.train {len(patterns)} patterns: {', '.join(patterns)}"
        problems.append(ConfigProblem("data.train_weights", message))
    for key, values in (("data.pixel_mean", data.pixel_mean), ("data.pixel_std", data.pixel_std)):
        if len(values) != config.model.in_channels:
            message = f"has {len(values)} values, model.in_channels is {config.model.in_channels}"
            problems.append(ConfigProblem(key, message))
    return problems


def _optim_problems(config: RunConfig) -> list[ConfigProblem]:
    optim, problems = config.optim, []
    if optim.warmup_steps >= optim.total_steps:
        message = f"{optim.warmup_steps} leaves nothing of optim.total_steps {optim.total_steps}"
        problems.append(ConfigProblem("optim.warmup_steps", message))
    for key, value in (("optim.min_lr", optim.min_lr), ("optim.warmup_lr", optim.warmup_lr)):
        if value > optim.lr:
            problems.append(ConfigProblem(key, f"{value} is above optim.lr {optim.lr}"))
    if optim.schedule == "multistep":
        steps = (0, *optim.milestones, optim.total_steps)
        if not optim.milestones or any(a >= b for a, b in pairwise(steps)):
            message = (
                f"{list(optim.milestones)}: multistep takes ascending steps below optim.total_steps {optim.total_steps}"
            )
            problems.append(ConfigProblem("optim.milestones", message))
    elif optim.milestones:
        message = f"{list(optim.milestones)}: only optim.schedule multistep has milestones, it is {optim.schedule}"
        problems.append(ConfigProblem("optim.milestones", message))
    return problems


def _engine_problems(config: RunConfig) -> list[ConfigProblem]:
    engine, problems = config.engine, []
    checkpointing = engine.activation_checkpointing
    if checkpointing.backend == "fairscale" and engine.precision == "bf16_autocast":
        message = (
            "fairscale recomputes under fp16 autocast whatever the forward used; use torch here, or precision bf16"
        )
        problems.append(ConfigProblem("engine.activation_checkpointing.backend", message))
    if checkpointing.offload and checkpointing.backend == "none":
        message = "no block inputs are kept without checkpointing; backend torch or fairscale keeps and offloads them"
        problems.append(ConfigProblem("engine.activation_checkpointing.offload", message))
    problems += _offload_problems(engine)
    for key in _flat_keys(engine.deepspeed_overrides):
        full = f"engine.deepspeed_overrides.{key}"
        owner = next((o for k, o in OWNED_BY_CONFIG.items() if key == k or key.startswith(k + ".")), None)
        if owner:
            problems.append(ConfigProblem(full, f"is set by {owner}; change it there"))
        elif key == "zero_optimization.sub_group_size" and engine.offload.optimizer_states == "nvme":
            problems.append(ConfigProblem(full, "is set by engine.offload.sub_group_elements; change it there"))
        elif key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, 1)
            problems.append(ConfigProblem(full, "no such DeepSpeed key", suggestion=near[0] if near else ""))
    return problems


def _offload_problems(engine: EngineConfig) -> list[ConfigProblem]:
    """What DeepSpeed can offload at which stage (deepspeed.ai/docs/config-json, "ZeRO optimizations")."""
    offload, stage, problems = engine.offload, engine.zero_stage, []
    on_disk = [key for key in ("optimizer_states", "parameters") if getattr(offload, key) == "nvme"]
    if stage < {"none": 0, "cpu": 1, "nvme": 3}[offload.optimizer_states]:
        stages = "3" if offload.optimizer_states == "nvme" else "1, 2 or 3"
        message = f"{offload.optimizer_states} needs engine.zero_stage {stages}, it is {stage}"
        problems.append(ConfigProblem("engine.offload.optimizer_states", message))
    if offload.parameters != "none" and stage < 3:
        message = f"{offload.parameters} needs engine.zero_stage 3, it is {stage}"
        problems.append(ConfigProblem("engine.offload.parameters", message))
    if on_disk and not offload.nvme_dir:
        message = f"engine.offload.{on_disk[0]} is nvme: give a folder on a fast disk of each node"
        problems.append(ConfigProblem("engine.offload.nvme_dir", message))
    return problems


def _checkpoint_problems(config: RunConfig) -> list[ConfigProblem]:
    every, validation = config.checkpoint.every_steps, config.evaluation.every_steps
    if config.evaluation.patience is not None and not (validation and config.data.validation):
        message = "stopping early takes data.validation, and evaluation.every_steps above 0"
        return [ConfigProblem("evaluation.patience", message)]
    if not config.checkpoint.keep_best:
        return []
    if config.data.validation is None:
        return [ConfigProblem("checkpoint.keep_best", "there is no data.validation to judge by")]
    if validation % every:
        message = (
            f"a checkpoint is judged by the validation of its own step: evaluation.every_steps {validation} must be a "
            f"multiple of checkpoint.every_steps {every}; {_either(nearest_multiples(validation, every))} fit"
        )
        return [ConfigProblem("checkpoint.keep_best", message)]
    return []


def _either(values: tuple[int, int]) -> str:
    return f"{values[0]} and {values[1]}" if values[0] != values[1] else str(values[0])


def _flat_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        # DeepSpeed would take a dotted name for one unknown key.
        key = f"{prefix}{name!r}" if "." in name else f"{prefix}{name}"
        keys += _flat_keys(value, f"{key}.") if isinstance(value, dict) and value else [key]
    return keys
