"""DeepSpeed's compiled operators: which ones a configuration needs, and what a killed compile has left."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._appdirs import user_cache_dir

from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine.doctor.findings import Finding, State, problem, warning

#: No compile of one operator takes so long, on two cores either.
_LONGEST_COMPILE_S = 1800


@dataclass(frozen=True)
class CompileLock:
    """A ``lock`` file beside an operator's sources.

    Attributes:
        is_held: a process is compiling now.
        is_waited_for: torch up to 2.14 at most takes the file itself for the lock: while it is there, every process
            that needs the operator waits, without a word and for ever. 2.15 locks the file, and the kernel frees that
            when a compile is killed (pytorch #189245).
    """

    path: Path
    age_s: float
    is_held: bool
    is_waited_for: bool

    @property
    def operator(self) -> str:
        return self.path.parent.name

    @property
    def is_left_behind(self) -> bool:
        return self.is_waited_for and not self.is_held and self.age_s > _LONGEST_COMPILE_S

    @property
    def text(self) -> str:
        age = f"{self.age_s / 60:.0f} minutes" if self.age_s < 7200 else f"{self.age_s / 3600:.0f} hours"
        if self.is_held:
            return f"{self.operator} is being compiled now ({self.path}, since {age})"
        if self.is_left_behind:
            return f"a compile of {self.operator} was killed {age} ago: {self.path} makes every later one wait for ever"
        return f"{self.operator} is being compiled, or its compile was killed: {self.path}, {age} old"

    @property
    def advice(self) -> str:
        return "wait for it" if self.is_held else f"if nothing is compiling there: rm {self.path}"


def build_root() -> Path:
    """Where torch compiles operators, and DeepSpeed through it. As torch.utils.cpp_extension finds it, which logs a
    warning when it is imported where there is no GPU.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(user_cache_dir("torch_extensions")))  # type: ignore[no-untyped-call]


def compile_locks(waits_for_files: bool | None = None) -> list[CompileLock]:
    """Lock files that something waits for, or could; the harmless ones of finished compiles are none.

    Args:
        waits_for_files: CompileLock.is_waited_for of all of them; None: what the installed torch does.
    """
    found = []
    root = build_root()
    paths = sorted((*root.glob("*/lock"), *root.glob("*/*/lock")))
    is_waited_for = bool(paths) and (_waits_for_files() if waits_for_files is None else waits_for_files)
    for path in paths:
        try:
            lock = CompileLock(path, max(time.time() - path.stat().st_mtime, 0.0), _is_held(path), is_waited_for)
        except OSError:
            continue  # just released, or somebody else's
        if lock.is_held or is_waited_for:
            found.append(lock)
    return found


def _waits_for_files() -> bool:
    """Whether this torch takes the existence of a file for a lock."""
    source = Path(torch.__file__).parent / "utils" / "cpp_extension.py"
    return "FileBaton(" in source.read_text(encoding="utf-8")


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def operators_needed(config: RunConfig) -> list[str]:
    """What a job of this configuration compiles at its start where it isn't compiled yet; nothing without experts'
    settings: the optimizer is torch's, files are read and written by engine/swap_files.py, and on CPUs the
    shared-memory transport is off (engine/deepspeed_import.py).
    """
    zero: Mapping[str, Any] = config.engine.deepspeed_overrides.get("zero_optimization", {})
    is_quantized = zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients")
    return ["quantizer"] if is_quantized else []


def look_at_operators(config: RunConfig | None) -> list[Finding]:
    """Of this node."""
    from deepspeed.git_version_info import installed_ops

    needed = operators_needed(config) if config else []
    root = build_root()
    missing = [
        name
        for name in needed
        if not installed_ops.get(name) and not any((*root.glob(f"{name}/*.so"), *root.glob(f"*/{name}/*.so")))
    ]
    locks = compile_locks()
    if stuck := [lock for lock in locks if lock.operator in missing and not lock.is_held]:
        return [problem("compiled operators", stuck[0].text, stuck[0].advice)]
    if locks:
        return [warning("compiled operators", lock.text, lock.advice) for lock in locks[:1]]
    if missing:
        found = f"{', '.join(missing)} will be compiled when the job starts, on every node: minutes"
        advice = f"compile once before, into a folder that all nodes see (TORCH_EXTENSIONS_DIR, now {root})"
        return [warning("compiled operators", found, advice)]
    found = f"{', '.join(needed)}: there" if needed else "none is needed, nothing is compiled at run time"
    return [Finding("compiled operators", found, State.OK)]
