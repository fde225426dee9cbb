"""YAML as plain data plus, for every key, the file and line that set it and what that overrode."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swinv2_scale.config.tasks import DEFAULT_TASK
from swinv2_scale.errors import ConfigError, ConfigProblem

KeyPath = tuple[str, ...]
_TASK_NAME: KeyPath = ("task", "name")

#: PyYAML takes time with the square of the depth, and Python's stack ends at a thousand.
_MAX_DEPTH = 100


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here it is the number that everybody means."""


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would read as a number."""


for _class in (_Loader, _Dumper):
    # Dates are nothing but texts here.
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


@dataclass(frozen=True)
class Setting:
    """One value and the place that gave it."""

    value: Any
    where: str


@dataclass
class Settings:
    """Leaf values by key path; the last entry of each history is the one in force."""

    history: dict[KeyPath, list[Setting]] = field(default_factory=dict)

    def set(self, path: KeyPath, value: Any, where: str) -> None:
        """Add a value; a whole section replaced by a value, or the other way round, forgets the old shape."""
        for other in [p for p in self.history if p != path and (p[: len(path)] == path or path[: len(p)] == p)]:
            del self.history[other]
        self.history.setdefault(path, []).append(Setting(value, where))

    def begin_other_task(self, name: Any) -> None:
        """Forget the section of a task of another name: its keys mean nothing to this one."""
        known = self.history.get(_TASK_NAME)
        if name is not None and name != (known[-1].value if known else DEFAULT_TASK):
            self.history = {path: entries for path, entries in self.history.items() if path[0] != _TASK_NAME[0]}

    def where(self, path: KeyPath) -> str:
        """The place of a key, or of the first key below it, or of the nearest one above."""
        for length in range(len(path), 0, -1):
            for known, entries in self.history.items():
                if known[:length] == path[:length]:
                    return entries[-1].where
        return ""

    def tree(self) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for path, entries in self.history.items():
            node = root
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = entries[-1].value
        return root


def read_settings(path: Path) -> Settings:
    """Read a file and everything it ``extends:``, base first.

    Raises:
        ConfigError: the file is missing, isn't YAML, or extends itself.
    """
    settings = Settings()
    _read_into(settings, path, ())
    return settings


def apply_overrides(settings: Settings, overrides: list[str]) -> None:
    """Apply ``key.path=value`` words of the command line; values are read as YAML.

    Raises:
        ConfigError: a word has no ``=`` or no key.
    """
    leaves: list[tuple[KeyPath, Any, str]] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key or word.startswith("-"):
            raise ConfigError(f"{word!r} is not an override", "write overrides as key.path=value, after the options")
        where = f"command line {word!r}"
        value = _parse(text, where, None) if text else None
        path = tuple(key.split("."))
        found = _leaves(value, path) if isinstance(value, dict) and value else [(path, value)]
        leaves += [(path, leaf, where) for path, leaf in found]
    # First of all, wherever among the words: the others are about the task that it names.
    settings.begin_other_task(next((leaf for path, leaf, _ in reversed(leaves) if path == _TASK_NAME), None))
    for path, leaf, where in leaves:
        settings.set(path, leaf, where)


def format_value(value: Any) -> str:
    """A value on one line, as it would be written in YAML."""
    text: str = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def as_tuples(value: Any) -> Any:
    """Lists of any depth, as JSON and people give them, as the tuples that configurations are made of."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def read_mapping(path: Path, lines: dict[KeyPath, int], origin: str = "") -> dict[str, Any]:
    """A YAML file as plain data; sequences are tuples.

    Args:
        lines: gets the line of every key, and of every item of a sequence, which has its position for a name.
        origin: what names the file, for errors; other files are what somebody else wrote.

    Raises:
        ConfigError: the file is missing, or no mapping in YAML.
    """
    try:
        if origin and path.exists() and not path.is_file():  # from a pipe nothing may ever come
            raise OSError("it is no plain file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}{origin}: {error}") from error
    data = _parse(text, str(path), lines)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, this file holds {type(data).__name__}")
    return data


def _read_into(settings: Settings, path: Path, chain: tuple[Path, ...]) -> None:
    lines: dict[KeyPath, int] = {}
    data = read_mapping(path, lines, f" (extended by {chain[-1]})" if chain else "")
    if path.resolve() in (p.resolve() for p in chain):
        raise ConfigError(f"{path} extends itself: {' -> '.join(str(p) for p in (*chain, path))}")
    base = data.pop("extends", None)
    bases = (base,) if isinstance(base, str) else base or ()
    if not isinstance(bases, tuple) or not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{path}:{lines['extends',]}: extends: is a file name, or a list of them, not {base!r}")
    for name in bases:
        _read_into(settings, path.parent / name, (*chain, path))
    leaves = _leaves(data, ())
    settings.begin_other_task(dict(leaves).get(_TASK_NAME))
    for key, value in leaves:
        settings.set(key, value, f"{path}:{lines.get(key, 1)}")


def _leaves(data: dict[str, Any], prefix: KeyPath) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, (*prefix, str(key)))
        else:
            found.append(((*prefix, str(key)), value))
    return found


def _parse(text: str, where: str, lines: dict[KeyPath, int] | None) -> Any:
    """YAML text as plain data: mappings, tuples for sequences, scalars; no aliases, no tags, no duplicate keys."""
    try:
        loader = _Loader(text)
        depth = 0
        for event in yaml.parse(text, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigError(f"{where}: nested too deeply to be a configuration")
            if isinstance(event, yaml.AliasEvent):
                line = f":{event.start_mark.line + 1}" if event.start_mark else ""
                raise ConfigError(f"{where}{line}: aliases (*name) are not supported")
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), where, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and lines is not None else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, where: str, lines: dict[KeyPath, int] | None) -> Any:
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise ConfigError(f"{where}:{node.start_mark.line + 1}: tags ({node.tag}) are not supported")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            line = key_node.start_mark.line + 1
            if key in result:
                dotted = ".".join((*path, key))
                raise ConfigError(
                    "the configuration can't be read",
                    problems=(ConfigProblem(dotted, "is written twice", f"{where}:{line}"),),
                )
            if lines is not None:
                lines[(*path, key)] = line
            result[key] = _build(loader, value_node, (*path, key), where, lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        if lines is not None:
            lines |= {(*path, str(n)): item.start_mark.line + 1 for n, item in enumerate(node.value)}
        return tuple(_build(loader, item, (*path, str(n)), where, lines) for n, item in enumerate(node.value))
    return loader.construct_object(node)
