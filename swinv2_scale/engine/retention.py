"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine.checkpoint import PART, Checkpoint, find, verify
from swinv2_scale.errors import CheckpointError
from swinv2_scale.telemetry.console import log


def is_whole(checkpoint: Checkpoint) -> bool:
    """Read every byte; says what is damaged."""
    try:
        verify(checkpoint)
    except CheckpointError as error:
        log().warning("%s; it doesn't count as one that is kept", error.message)
        return False
    return True


def to_delete(
    found: Sequence[Checkpoint], policy: CheckpointConfig, is_whole: Callable[[Checkpoint], bool]
) -> list[Checkpoint]:
    """Those that nothing asks to keep, judging by what is whole: damaged ones never count among the kept.

    The newest ``keep`` (two or more) stay, every one at a multiple of ``keep_every_steps``, and the ``keep_best`` with
    the smallest score. A damaged one stays as well as long as there are fewer than ``keep`` whole ones: parts
    of it may be all that is left. No older one goes until enough newer ones were read back and found whole.

    Args:
        found: newest first, as find() gives them.
    """
    best = sorted((c for c in found if c.score is not None), key=lambda c: (c.score, -c.step))
    asked = {c.path for c in best[: policy.keep_best]}
    if policy.keep_every_steps:
        asked |= {c.path for c in found if c.step % policy.keep_every_steps == 0}
    gone, num_whole = [], 0
    for checkpoint in found:
        if num_whole < policy.keep:
            num_whole += is_whole(checkpoint)
        elif checkpoint.path not in asked:
            gone.append(checkpoint)
    return gone


def delete(checkpoint: Checkpoint) -> None:
    """Renamed first: a deletion that is killed half-way leaves nothing that looks like a checkpoint."""
    gone = checkpoint.path.with_name(PART + checkpoint.path.name)
    checkpoint.path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(folder: Path, step: int, policy: CheckpointConfig, is_whole: Callable[[Checkpoint], bool]) -> list[Path]:
    """Delete what isn't kept, after ``step`` was published; what is of later steps belongs to a dropped future.

    Returns:
        what was deleted.
    """
    found = find(folder)
    past = [checkpoint for checkpoint in found if checkpoint.step <= step]
    gone = [*to_delete(past, policy, is_whole), *(checkpoint for checkpoint in found if checkpoint.step > step)]
    for checkpoint in gone:
        delete(checkpoint)
    return [checkpoint.path for checkpoint in gone]
