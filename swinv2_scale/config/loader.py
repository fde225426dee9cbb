"""From files and overrides to one RunConfig, or to every problem at once."""

from __future__ import annotations

import difflib
import typing
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from swinv2_scale.config.model import VARIANTS
from swinv2_scale.config.rules import cross_section_problems
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.source import KeyPath, Settings, apply_overrides, format_value, read_settings
from swinv2_scale.config.tasks import DEFAULT_TASK, TASK_SECTIONS
from swinv2_scale.errors import ConfigError, ConfigProblem

#: What other trainers call it.
_OTHER_NAMES: dict[str, KeyPath] = {
    "learning_rate": ("optim", "lr"),
    "batch_size": ("data", "global_batch_size"),
    "epochs": ("optim", "total_steps"),
    "img_size": ("model", "image_size"),
    "clip_grad": ("optim", "clip_grad_norm"),
    "use_checkpoint": ("engine", "activation_checkpointing"),
}


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration and where each of its values came from."""

    config: RunConfig
    settings: Settings
    path: Path

    def origin(self, key: KeyPath) -> str:
        """File and line, the command line, ``variant NAME`` or ``default``."""
        # A free mapping (deepspeed_overrides) is one value here and several keys in the files.
        for path, entries in self.settings.history.items():
            if path[: len(key)] == key:
                return entries[-1].where
        if key[0] == "model" and key[-1] in VARIANTS[self.config.model.variant]:
            return f"variant {self.config.model.variant}"
        return "default"

    def overridden(self, key: KeyPath) -> tuple[str, ...]:
        """What the value in force replaced, newest first, as ``value (place)``."""
        entries = self.settings.history.get(key, [])[:-1]
        return tuple(f"{format_value(entry.value)} ({entry.where})" for entry in reversed(entries))

    def with_value(self, key: KeyPath, value: Any, where: str) -> LoadedConfig:
        """The same with one value of a section worked out, and from what."""
        settings = Settings({path: list(entries) for path, entries in self.settings.history.items()})
        settings.set(key, value, where)
        for depth in range(len(key) - 1, 0, -1):
            section: BaseModel = reduce(getattr, key[:depth], self.config)
            value = section.model_copy(update={key[depth]: value})
        return LoadedConfig(self.config.model_copy(update={key[0]: value}), settings, self.path)


def load_config(path: str | Path, overrides: list[str] | None = None) -> LoadedConfig:
    """Read, merge and validate.

    Raises:
        ConfigError: with every problem found: file, line, key, what is wrong and the nearest valid key.
    """
    settings = read_settings(Path(path))
    apply_overrides(settings, overrides or [])
    try:
        config = RunConfig.model_validate(settings.tree())
    except ValidationError as error:
        problems = _problems(error, settings)
        raise _refusal(path, problems) from None
    problems = _variant_problems(config, settings) + [
        ConfigProblem(p.key, p.message, settings.where(tuple(p.key.split("."))), p.suggestion)
        for p in cross_section_problems(config)
    ]
    if problems:
        raise _refusal(path, problems)
    return LoadedConfig(config, settings, Path(path))


def flatten(config: BaseModel, prefix: KeyPath = ()) -> dict[KeyPath, Any]:
    """Every leaf of a configuration by its key path, in the order of the classes."""
    leaves: dict[KeyPath, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            leaves.update(flatten(value, (*prefix, name)))
        else:
            leaves[(*prefix, name)] = value
    return leaves


def to_yaml(loaded: LoadedConfig) -> str:
    """The resolved configuration, each line with the origin of its value as a comment; reads back as the same run."""
    lines = [f"# Resolved from {loaded.path}. Every value, and where it came from."]
    section: KeyPath = ()
    for key, value in flatten(loaded.config).items():
        parents = key[:-1]
        for depth in range(len(parents)):
            if section[: depth + 1] != parents[: depth + 1]:
                lines.append("  " * depth + f"{parents[depth]}:")
        section = parents
        lines.append("  " * len(parents) + f"{key[-1]}: {format_value(value)}  # {loaded.origin(key)}")
    return "\n".join(lines) + "\n"


def _refusal(path: str | Path, problems: list[ConfigProblem]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(
        f"{path} has {count}:",
        f"correct them, then: swinv2-scale config check {path}",
        tuple(dict.fromkeys(problems)),
    )


def _variant_problems(config: RunConfig, settings: Settings) -> list[ConfigProblem]:
    if config.model.variant in VARIANTS:
        return []
    near = difflib.get_close_matches(config.model.variant, VARIANTS, 1)
    return [
        ConfigProblem(
            "model.variant",
            f"{config.model.variant!r} is none of {', '.join(VARIANTS)}",
            settings.where(("model", "variant")),
            near[0] if near else "",
        )
    ]


def _problems(error: ValidationError, settings: Settings) -> list[ConfigProblem]:
    """pydantic's report in the user's words; the branches of a union are one problem, not several."""
    by_key: dict[KeyPath, list[str]] = {}
    suggestions: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        key = _key_of(item["loc"])
        if item["type"] == "extra_forbidden":
            task = _task_of(settings)
            owners = [name for name, section in TASK_SECTIONS.items() if key in _all_keys(section, None, ("task",))]
            message = f"is a key of {owners[0]}, task.name is {task}" if owners else "no such key"
            suggestions[key] = "" if owners else nearest_key(key, task)
        elif item["type"] == "no_such_task":
            if isinstance(item["input"], dict):
                key, name = (*key, "name"), item["input"].get("name")
                message = f"{format_value(name)} is none of {', '.join(TASK_SECTIONS)}"
                suggestions[key] = next(iter(difflib.get_close_matches(str(name), TASK_SECTIONS, 1)), "")
            else:
                message = (
                    f"{format_value(item['input'])} is no section; the name in one is {' or '.join(TASK_SECTIONS)}"
                )
                suggestions[key] = "task.name"
        elif item["type"] == "missing":
            message = "is required"
        else:
            message = f"{format_value(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"
        by_key.setdefault(key, []).append(message)
    return [
        ConfigProblem(
            ".".join(key), "; or ".join(dict.fromkeys(messages)), settings.where(key), suggestions.get(key, "")
        )
        for key, messages in by_key.items()
    ]


def _key_of(loc: tuple[int | str, ...]) -> KeyPath:
    """A pydantic location without the union branches and positions that it puts in."""
    key: list[str] = []
    sections: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        if not sections or not isinstance(part, str):
            break
        if len(sections) > 1 and part in TASK_SECTIONS:
            sections = [TASK_SECTIONS[part]]
        else:
            key.append(part)
            sections = _sections(sections[0], part)
    return tuple(key)


def _task_of(settings: Settings) -> str:
    history = settings.history.get(("task", "name"))
    return str(history[-1].value) if history else DEFAULT_TASK


def _sections(section: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """What a key may hold: none for a plain value, several where its kind is chosen by name."""
    found = section.model_fields.get(name)
    options = [found.annotation] if found else []
    while nested := [argument for option in options for argument in typing.get_args(option)]:
        options = [option for option in options if isinstance(option, type)] + nested
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _all_keys(section: type[BaseModel], task: str | None, prefix: KeyPath = ()) -> list[KeyPath]:
    keys: list[KeyPath] = []
    for name in section.model_fields:
        keys.append((*prefix, name))
        below = _sections(section, name)
        chosen = [b for b in below if TASK_SECTIONS.get(task or "") is b] or below
        for option in chosen:
            keys += _all_keys(option, task, (*prefix, name))
    return keys


def nearest_key(key: KeyPath, task: str | None = None) -> str:
    """A key of the same name elsewhere, else a sibling that is spelled alike, else one spelled alike elsewhere.

    Args:
        task: the name of the one whose keys count; None: all of them.
    """
    known = _all_keys(RunConfig, task)
    same = [k for k in known if k[-1] == key[-1]]
    if same:
        return ".".join(same[0])
    siblings = {k[-1]: k for k in known if k[:-1] == key[:-1]}
    near = difflib.get_close_matches(key[-1], siblings, 1)
    if near:
        return ".".join(siblings[near[0]])
    elsewhere = {**_OTHER_NAMES, **{k[-1]: k for k in reversed(known)}}
    near = difflib.get_close_matches(key[-1], elsewhere, 1, cutoff=0.75)
    return ".".join(elsewhere[near[0]]) if near else ""


def nearest_model_field(name: str) -> str:
    """The field of ModelConfig that a wrong name is nearest to, another library's word included; empty if none is."""
    section, _, field = nearest_key(("model", name)).partition(".")
    return field if section == "model" else ""
