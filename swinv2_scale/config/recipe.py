"""A recipe: stages in order, each a job of its own that starts from the one before. Checked whole before anything runs.

All that can be known from the files is: that every stage's configuration is valid, and that each stage can take the
weights of the one that it starts from. What has become of the runs is engine/chain.py's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from swinv2_scale.config.head_map import read_head_map
from swinv2_scale.config.loader import LoadedConfig, load_config
from swinv2_scale.config.model import ModelConfig, PretrainedWindows, Section
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.source import KeyPath, format_value, read_mapping
from swinv2_scale.config.tasks import ClassificationConfig
from swinv2_scale.errors import ConfigError, ConfigProblem, WeightsError

#: What the tensors of two models have their shapes from, but for heads and channels.
_SHAPE = ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "extra_norm_every", "extra_norm_counter")

#: DeepSpeed's pdsh hands the words of a command to a remote shell as they are; those of a file are not the user's own.
_Word = Annotated[str, Field(pattern=r"^[^`$;&|<>\\\x00-\x1f\x7f]*\z")]


class StageEntry(Section):
    """One stage, as a recipe's file has it."""

    #: A part of its run directory's name.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z")]
    #: The stage's YAML file; from the recipe's folder.
    config: _Word
    #: ``key.path=value``, as on the command line.
    overrides: tuple[_Word, ...] = ()
    #: The stage whose weights it begins with: without this key the one before; null: what its configuration says.
    starts_from: str | None = None


class RecipeFile(Section):
    """A recipe's file."""

    stages: Annotated[tuple[StageEntry, ...], Field(min_length=1, max_length=99)]
    #: Of all stages; a stage's own come after them.
    overrides: tuple[_Word, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe that fits the others.

    Attributes:
        number: from 1.
        words: all overrides, ``init_from`` among them: what a launch script is given beside the configuration.
        predecessor: the stage that it starts from.
    """

    number: int
    name: str
    config_path: Path
    run_dir: Path
    words: tuple[str, ...]
    loaded: LoadedConfig
    predecessor: Stage | None

    @property
    def config(self) -> RunConfig:
        return self.loaded.config


@dataclass(frozen=True)
class Recipe:
    """Stages in order, and the folder of their run directories."""

    path: Path
    folder: Path
    stages: tuple[Stage, ...]


def load_recipe(path: Path, folder: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and every stage of it, and check that they fit together.

    Args:
        folder: of the run directories; None: runs/NAME-OF-RECIPE.
        overrides: of all stages, after those of the file.

    Raises:
        ConfigError: with every problem of every stage, each with its file and line.
    """
    lines: dict[KeyPath, int] = {}
    data = read_mapping(path, lines)
    try:
        file = RecipeFile.model_validate(data)
    except ValidationError as error:
        raise _refusal(path, [_problem_of(dict(item), path, lines) for item in error.errors()]) from None
    reader = _Reader(path, folder or Path("runs") / path.stem, file, lines, tuple(overrides))
    for position in range(len(file.stages)):
        reader.read(position)
    if reader.problems:
        raise _refusal(path, reader.problems)
    return Recipe(path, reader.folder, tuple(reader.stages.values()))


def shape_differences(before: ModelConfig, after: ModelConfig) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for all that keeps a model from taking another one's weights."""
    for name in _SHAPE:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield name, f"is {format_value(new)}, the stage that it starts from has {format_value(old)}"
    if before.in_channels not in (after.in_channels, 3):
        message = f"is {after.in_channels}, the stage that it starts from has {before.in_channels}; only RGB is adapted"
        yield "in_channels", message


@dataclass
class _Reader:
    """Reads stage after stage; those that are whole, and what is wrong with the others."""

    path: Path
    folder: Path
    file: RecipeFile
    lines: dict[KeyPath, int]
    overrides: tuple[str, ...]
    stages: dict[str, Stage] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def read(self, position: int) -> None:
        entry = self.file.stages[position]
        places = self._places(position)
        found = self._start_problems(entry, position, places["stage"])
        start = self.file.stages[position - 1].name if position else None
        if "starts_from" in entry.model_fields_set:
            start = entry.starts_from
        predecessor = None if found or start is None else self.stages.get(start)
        stage = self._load(entry, position, predecessor, places["stage"], found)
        if stage is not None:
            self.stages.setdefault(entry.name, stage)
            found += _chain_problems(stage, places["stage"])
        self.problems += [replace(problem, where=places.get(problem.where, problem.where)) for problem in found]

    def _places(self, position: int) -> dict[str, str]:
        """The lines of a stage and of its overrides, which the loader takes for words of the command line."""
        places = {"stage": f"{self.path}:{self.lines['stages', str(position)]}"}
        entry = self.file.stages[position]
        own: KeyPath = ("stages", str(position), "overrides")
        for words, key in ((self.file.overrides, ("overrides",)), (entry.overrides, own)):
            for number, word in enumerate(words):
                places[f"command line {word!r}"] = f"{self.path}:{self.lines[(*key, str(number))]}"
        return places

    def _start_problems(self, entry: StageEntry, position: int, where: str) -> list[ConfigProblem]:
        """What is wrong with a stage's name and with the one that it starts from."""
        earlier = [stage.name for stage in self.file.stages[:position]]
        problems = []
        if entry.name in earlier:
            problems.append(ConfigProblem(f"stages.{entry.name}: name", "another stage has this name", where))
        if entry.starts_from is not None and entry.starts_from not in earlier:
            message = f"{entry.starts_from!r} is no stage before this one; there are {', '.join(earlier) or 'none'}"
            near = difflib.get_close_matches(entry.starts_from, earlier, 1)
            problems.append(ConfigProblem(f"stages.{entry.name}: starts_from", message, where, near[0] if near else ""))
        return problems

    def _load(
        self, entry: StageEntry, position: int, predecessor: Stage | None, where: str, problems: list[ConfigProblem]
    ) -> Stage | None:
        """A stage's configuration, as its job will read it; None, and its problems, if it is wrong."""
        config = self.path.parent / entry.config
        key = f"stages.{entry.name}"
        if not config.is_file():  # never opened: from a pipe nothing may ever come
            message = "is no plain file" if config.exists() else "does not exist"
            problems.append(ConfigProblem(f"{key}: config", f"{config} {message}", where))
            return None
        words = (*self.file.overrides, *entry.overrides, *self.overrides)
        if predecessor is not None:
            given = [word for word in words if word.partition("=")[0] == "init_from"]
            if given:
                message = f"it starts from {predecessor.name} already; starts_from: null leaves it to init_from"
                problems.append(ConfigProblem(f"{key}: init_from", message, f"command line {given[-1]!r}"))
            words = (*words, f"init_from={format_value(str(predecessor.run_dir))}")
        try:
            loaded = load_config(config, list(words))
        except ConfigError as error:
            problems += [ConfigProblem(f"{key}: {p.key}", p.message, p.where, p.suggestion) for p in error.problems]
            if not error.problems:
                problems.append(ConfigProblem(key, error.message, where))
            return None
        run_dir = self.folder / f"{position + 1:02d}-{entry.name}"
        return Stage(position + 1, entry.name, config, run_dir, words, loaded, predecessor)


def _chain_problems(stage: Stage, where: str) -> list[ConfigProblem]:
    """Why a stage can't go on with the weights of the one that it starts from."""
    before = stage.predecessor
    if before is None:
        return []
    found = [(f"model.{key}", text) for key, text in shape_differences(before.config.model, stage.config.model)]
    given = stage.config.model.pretrained_window_sizes
    first = _first_windows(before)
    if first is not None and any(given or ()) and stage.config.model.settled.pretrained_window_sizes != first:
        message = f"is {format_value(given)}, inherited from {before.name} are {format_value(first)}; leave it out"
        found.append(("model.pretrained_window_sizes", message))
    if isinstance(stage.config.task, ClassificationConfig):
        found += _head_problems(stage.config, stage.config.task, before)
    return [
        ConfigProblem(
            f"stages.{stage.name}: {key}",
            f"{text} (stage {before.name}, {before.config_path})",
            stage.loaded.settings.where(tuple(key.split("."))) or where,
        )
        for key, text in found
    ]


def _first_windows(stage: Stage) -> PretrainedWindows | None:
    """The windows that a stage's weights were first trained with; None where only the weights know."""
    model = stage.config.model
    if any(model.pretrained_window_sizes or ()):
        return model.settled.pretrained_window_sizes
    if stage.predecessor is not None:
        return _first_windows(stage.predecessor)
    return None if stage.config.init_from else model.settled.pretrained_window_sizes


def _head_problems(config: RunConfig, task: ClassificationConfig, before: Stage) -> list[tuple[str, str]]:
    num_old = before.config.model.num_classes if isinstance(before.config.task, ClassificationConfig) else None
    num_new = config.model.num_classes
    if task.init_head == "new":
        return []
    if num_old is None:
        if task.init_head_map is not None:
            return [("task.init_head_map", "a map picks rows of a head, and that stage has none")]
        return [("task.init_head", "there is no head to keep")] if task.init_head == "keep" else []
    if task.init_head_map is not None:
        try:
            read_head_map(task.init_head_map, num_old, num_new)
        except WeightsError as error:
            return [("task.init_head_map", error.message)]
        return []
    if num_old != num_new:
        message = (
            f"is {num_new}, that stage's head has {num_old}; task.init_head_map picks rows of it, "
            "task.init_head: new starts a new one"
        )
        return [("model.num_classes", message)]
    return []


def _problem_of(item: dict[str, Any], path: Path, lines: dict[KeyPath, int]) -> ConfigProblem:
    loc = tuple(str(part) for part in item["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    key, suggestion = ".".join(loc), ""
    if item["type"] == "extra_forbidden":
        known = StageEntry.model_fields if len(loc) > 1 else RecipeFile.model_fields
        message = "no such key"
        suggestion = next(iter(difflib.get_close_matches(loc[-1], known, 1)), "")
    elif item["type"] == "missing":
        message = "is required"
    elif item["type"] == "string_pattern_mismatch":
        allowed = (
            "letters, digits, . _ -" if loc[-1] == "name" else "what no remote shell obeys: no ` $ ; & | < > or \\"
        )
        message = f"{format_value(item['input'])}: holds other characters than {allowed}"
    else:
        message = f"{format_value(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"
    return ConfigProblem(key, message, f"{path}:{line}", suggestion)


def _refusal(path: Path, problems: list[ConfigProblem]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    next_step = f"correct them, then: swinv2-scale recipe check {path}"
    return ConfigError(f"{path} has {count}:", next_step, tuple(dict.fromkeys(problems)))
