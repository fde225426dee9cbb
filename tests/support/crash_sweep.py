"""Crash after every operation of some recorded saves, and ask the reader what it finds."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swinv2_scale.engine import checkpoint
from swinv2_scale.errors import CheckpointError
from tests.support.crashes import Disk, Tree
from tests.support.processes import run_worker

_CHECKPOINTS = "run/checkpoints"


@dataclass
class Sweep:
    """What came of it."""

    num_operations: int = 0
    #: Crashes by what survived: "all", "safe", "mixed".
    crashes: Counter[str] = field(default_factory=Counter)
    #: Different contents of the disk among them; each was judged once.
    num_states: int = 0
    #: States by how many whole checkpoints the reader found.
    whole: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def record_saves(scratch: Path, processes: int, num_saves: int) -> list[dict[str, Any]]:
    """Save so many checkpoints of a real engine, of which two stay.

    Returns:
        the operations; replayed, they give the folder that is there, byte for byte.
    """
    disk, record = scratch / "disk", scratch / "record"
    disk.mkdir()
    run_worker("traced_saves.py", disk, record, 1, num_saves, 2, processes=processes)
    operations = [json.loads(line) for line in record.read_text().splitlines()]
    replayed = Disk()
    for operation in operations:
        replayed.apply(operation)
    found = {
        f"{path.relative_to(disk)}{'/' * path.is_dir()}": b"" if path.is_dir() else path.read_bytes()
        for path in disk.rglob("*")
    }
    unseen = sorted(
        name for name in found.keys() | replayed.tree().keys() if found.get(name) != replayed.tree().get(name)
    )
    assert not unseen, f"something was written past the trace (see file_trace.py): {unseen}"
    return operations


def sweep(operations: list[dict[str, Any]], scratch: Path, num_mixed: int, first_save: int = 1) -> Sweep:
    """Crash before and after each operation from a save on; at each, all, nothing unsafe or a mixture survives."""
    judge, result, disk, rng = _Judge(operations, scratch), Sweep(), Disk(), random.Random(0)
    saved, is_on, seen = 0, False, set()
    for number, operation in enumerate(operations):
        if operation["do"] == "mark":
            verb, _, step = operation["text"].partition(" ")
            saved = int(step) if verb == "saved" else saved
            is_on = is_on or int(step) == first_save
        disk.apply(operation)
        if not is_on:
            continue
        result.num_operations += operation["do"] != "mark"
        for survives, tree in disk.states(rng, num_mixed):
            result.crashes[survives] += 1
            key = (saved, frozenset(tree.items()))
            if key in seen:
                continue
            seen.add(key)
            count, faults = judge(tree, saved)
            result.whole[count] += 1
            shown = {k: v for k, v in operation.items() if k != "data"}
            result.failures += [f"crash after operation {number} {shown}, {survives} survives: {f}" for f in faults]
    result.num_states = len(seen)
    return result


class _Judge:
    """The reader, and what it may find."""

    def __init__(self, operations: list[dict[str, Any]], scratch: Path) -> None:
        self._folder, self._store = scratch / "crashed", scratch / "contents"
        self._store.mkdir()
        self._stored: dict[bytes, Path] = {}
        self._truth: dict[int, Tree] = {}  # every checkpoint as its save left it
        disk = Disk()
        for operation in operations:
            disk.apply(operation)
            if operation.get("text", "").startswith("saved "):
                step = int(operation["text"].split()[1])
                self._truth[step] = _below(disk.tree(), f"{_CHECKPOINTS}/step-{step:08d}/")
                assert self._truth[step], f"step {step} was said to be saved"

    def __call__(self, tree: Tree, saved: int) -> tuple[int, list[str]]:
        """How many whole checkpoints there are, and what is wrong.

        Args:
            saved: the last step whose save had returned before the crash.
        """
        self._write(tree)
        folder, faults, whole = self._folder / _CHECKPOINTS, [], []
        logging.disable(logging.WARNING)  # thousands of states have something that is passed over
        try:
            for candidate in checkpoint.find(folder):
                try:
                    checkpoint.verify(candidate)
                except CheckpointError:
                    continue
                whole.append(candidate.step)
                name = f"{_CHECKPOINTS}/{candidate.path.name}/"
                if _below(tree, name) != self._truth.get(candidate.step):
                    faults.append(f"{candidate.path.name} is taken for whole and isn't what was saved")
            newest = checkpoint.open_run_or_checkpoint(folder).step
        except CheckpointError:
            newest = 0
        finally:
            logging.disable(logging.NOTSET)
            shutil.rmtree(self._folder, ignore_errors=True)
        if newest != max(whole, default=0):
            faults.append(f"resume takes {newest} of {whole}")
        if newest < saved:
            faults.append(f"the newest whole one is {newest}, {saved} had been saved")
        if len(whole) < min(saved, 2):
            faults.append(f"{whole} are whole, two or more had been")
        return len(whole), faults

    def _write(self, tree: Tree) -> None:
        self._folder.mkdir()
        for name in sorted(tree):
            path = self._folder / name
            if name.endswith("/"):
                path.mkdir()
            else:  # hard links: the same contents come a thousand times
                if tree[name] not in self._stored:
                    stored = self._stored[tree[name]] = self._store / str(len(self._stored))
                    stored.write_bytes(tree[name])
                os.link(self._stored[tree[name]], path)


def _below(tree: Tree, folder: str) -> Tree:
    return {name.removeprefix(folder): content for name, content in tree.items() if name.startswith(folder)}
