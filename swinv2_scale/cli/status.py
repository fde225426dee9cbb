"""``swinv2-scale status RUN [RUN ...]``: where runs stand. Torch is never imported, and nothing is written."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swinv2_scale.errors import printable

if TYPE_CHECKING:
    from swinv2_scale.engine.status import RunStatus

#: Lives that are shown, the last ones.
_SHOWN_LIVES = 8


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("status", help="where runs stand: step, rate, time left, restarts, last checkpoint")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory; several: a recipe's stages")
    parser.add_argument("--json", action="store_true", help="for scripts")
    words = "end with 0 if all are finished, 85 if one is to be started again, 73 if a job has it, else why it failed"
    parser.add_argument("--exit-code", action="store_true", help=words)
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.status import read_status

    found = [read_status(run) for run in arguments.runs]
    if arguments.json:
        print(json.dumps([status.to_json() for status in found], indent=1))
    else:
        # Piped, a table must not be cut to 80 columns.
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(_one(found[0]) if len(found) == 1 else _several(found), highlight=False)
    if arguments.exit_code:
        sys.exit(next((int(status.exit_code) for status in found if status.exit_code), 0))


def _one(status: RunStatus) -> Table:
    """One run: a line for each thing there is to say."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    config, left = status.config, status.seconds_left
    rows = [("run", str(status.path))]
    if config:
        source = f" from {config.init_from}" if config.init_from else ""
        rows.append(
            ("stage", f"{config.task.name}, {config.model.variant}, {_size(config.model.image_size)} px{source}")
        )
    rows += [("state", _state(status)), ("step", _steps(status))]
    if status.loss is not None:
        rows.append(("loss", _loss(status)))
    if status.images_per_second is not None:
        rows.append(("rate", f"{status.images_per_second:,.0f} images/s"))
    if left:
        rows.append(("time left", _duration(left) + ("" if status.state == "running" else ", once it runs again")))
    rows.append(("checkpoint", _checkpoint(status)))
    rows += [(name, f"{count:,}") for name, count in _unusual(status) if count]
    if status.state in ("stopped", "killed") and status.lives[-1].command:
        words = [word for word in status.lives[-1].command if not word.startswith("--local_rank")]
        rows.append(("resume", f"the same command goes on from there: {shlex.join(words)}"))
    first = max(len(status.lives) - _SHOWN_LIVES, 0)
    for number, life in enumerate(status.lives[first:], first + 1):
        where = f"step {life.from_step}" if life.from_step is not None else "before training"
        until = f" to {life.step}" if life.step is not None else ""
        ended = f"{_time(life.ended)} {status.ended(life)}".strip()
        processes = f" on {life.world_size} processes" if life.world_size else ""
        rows.append((f"life {number}", f"{_time(life.started)} {where}{until}{processes}; {ended}".strip()))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(printable(text)))
    return table


def _several(found: list[RunStatus]) -> Table:
    """A recipe: a row for each run."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    left = ("run", "state", "last checkpoint")
    for name in ("run", "state", "step", "loss", "images/s", "left", "lives", "last checkpoint", "unusual"):
        table.add_column(name, justify="left" if name in left else "right")
    for status in found:
        rate, seconds = status.images_per_second, status.seconds_left
        cells = (
            status.path.name or str(status.path),
            status.state,
            _steps(status),
            _loss(status),
            "" if rate is None else f"{rate:,.0f}",
            _duration(seconds) if seconds else "",
            str(len(status.lives)),
            _checkpoint(status),
            ", ".join(f"{count:,} {name}" for name, count in _unusual(status) if count),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _state(status: RunStatus) -> str:
    return f"{status.state}: {status.reason}" if status.reason else status.state


def _steps(status: RunStatus) -> str:
    total = status.total_steps
    share = f" ({status.step / total:.0%})" if total else ""
    return f"{status.step:,} of {'?' if total is None else f'{total:,}'}{share}"


def _loss(status: RunStatus) -> str:
    return "" if status.loss is None else f"{status.loss:.4f}"


def _checkpoint(status: RunStatus) -> str:
    found, age_s = status.checkpoint, status.checkpoint_age_s
    if found is None:
        return "none yet"
    age = "" if age_s is None else f", {_duration(age_s)} ago"
    return f"step {found.step:,}{age}, {found.num_bytes / 2**20:,.1f} MiB; {status.num_checkpoints} kept"


def _unusual(status: RunStatus) -> tuple[tuple[str, int], ...]:
    return ("quarantined", status.quarantined), ("anomalies", status.anomalies)


def _size(image_size: int | tuple[int, ...]) -> str:
    return "x".join(map(str, image_size)) if isinstance(image_size, tuple) else str(image_size)


def _time(text: str) -> str:
    """``2026-11-23T06:37:24+0000`` -> ``2026-11-23 06:37:24``."""
    return text[:19].replace("T", " ")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
