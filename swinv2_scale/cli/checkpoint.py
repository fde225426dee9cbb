"""``swinv2-scale checkpoint list|verify|prune|consolidate``: a run's checkpoints, for people."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.cli.models import add_average, export_run
from swinv2_scale.errors import CheckpointError, printable

if TYPE_CHECKING:
    from swinv2_scale.config.run import CheckpointConfig
    from swinv2_scale.engine.checkpoint import Checkpoint


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="what a run has saved: list, verify, prune, consolidate")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="what there is, as its manifests say")
    _add_run(listing)
    listing.add_argument("--json", action="store_true", help="for scripts")
    listing.set_defaults(run=_list)

    verify = actions.add_parser("verify", help="read every byte and compare it with the manifests; 65 if any differs")
    _add_run(verify)
    verify.set_defaults(run=_verify)

    prune = actions.add_parser("prune", help="delete what the run's configuration, or these options, don't keep")
    _add_run(prune)
    for option, count, words in (
        ("--keep", _two_or_more, "the newest so many that are whole, two at least"),
        ("--keep-every-steps", positive_int, "and those of steps that this divides"),
        ("--keep-best", positive_int, "and so many with the smallest validation loss"),
    ):
        prune.add_argument(option, type=count, metavar="N", help=f"{words} (default: the run's own)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.set_defaults(run=_prune)

    words = "one file of the float32 weights, whatever number of processes saved them"
    consolidate = actions.add_parser("consolidate", help=words)
    _add_run(consolidate)
    consolidate.add_argument("destination", type=Path, help="a .safetensors file; for other formats: export")
    add_average(consolidate)
    consolidate.set_defaults(run=export_run, style="native", fields=[])


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN", help="a run directory, or one checkpoint of it")


def _two_or_more(text: str) -> int:
    value = positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError("two at least stay: a damaged one needs another to fall back to")
    return value


def _list(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.checkpoint import read_state

    rows = []
    for found in _found(arguments.source):
        try:
            config = read_state(found)["config"]
        except CheckpointError:
            config = {}  # verify says what is wrong with it
        rows.append(
            {
                "step": found.step,
                "saved": found.saved,
                "bytes": found.num_bytes,
                "processes": found.world_size,
                "zero_stage": config.get("engine.zero_stage"),
                "precision": config.get("engine.precision"),
                "validation_loss": found.validation_loss,
                "path": str(found.path),
            }
        )
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # 80 columns
    for name in ("step", "saved", "size", "processes", "ZeRO", "precision", "validation loss"):
        table.add_column(name, justify="left" if name in ("saved", "precision") else "right", no_wrap=True)
    for row in rows:
        loss = row["validation_loss"]
        cells = (
            f"{row['step']:,}",
            row["saved"][:16].replace("T", " "),
            f"{row['bytes'] / 2**20:,.1f} MiB",
            row["processes"],
            "" if row["zero_stage"] is None else row["zero_stage"],
            row["precision"] or "",
            "" if loss is None else f"{loss:.4f}",
        )
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    console = Console()
    console.print(table)
    words = "what their manifests say; every byte is compared by: swinv2-scale checkpoint verify RUN"
    console.print(f"\n{words}", highlight=False)


def _verify(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.checkpoint import verify

    found = _found(arguments.source)
    damaged = []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=sum(checkpoint.num_bytes for checkpoint in found))
        for checkpoint in found:
            try:
                verify(checkpoint, lambda num_bytes: progress.advance(task, num_bytes))
            except CheckpointError as error:
                damaged.append(checkpoint)
                print(printable(f"step {checkpoint.step}: DAMAGED: {error.message}"))
            else:
                size = f"{checkpoint.num_bytes / 2**20:,.1f} MiB"
                print(f"step {checkpoint.step}: whole, {len(checkpoint.files)} files, {size}")
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(found)} checkpoints of {arguments.source} are damaged",
            "a run falls back to the newest whole one by itself; restore the others from a copy, or delete them",
        )


def _prune(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.checkpoint import read_state
    from swinv2_scale.engine.retention import delete, is_whole, to_delete
    from swinv2_scale.engine.run_dir import RunDirectory

    found = _found(arguments.source)
    policy = _policy(read_state(found[0])["config"], arguments)
    directory = RunDirectory(arguments.source)
    directory.lock()  # a job that saves prunes by itself
    try:
        gone = to_delete(found, policy, is_whole)
        for checkpoint in gone:
            if not arguments.dry_run:
                delete(checkpoint)
            print(f"{'would delete' if arguments.dry_run else 'deleted'} {checkpoint.path}")
    finally:
        directory.close()
    size = sum(checkpoint.num_bytes for checkpoint in gone) / 2**20
    print(f"{len(gone)} of {len(found)} checkpoints, {size:,.1f} MiB")


def _policy(config: dict[str, Any], arguments: argparse.Namespace) -> CheckpointConfig:
    """As the run has it, changed by the options."""
    from swinv2_scale.config.run import CheckpointConfig

    options = {name: getattr(arguments, name) for name in ("keep", "keep_every_steps", "keep_best")}
    fields = {name: config.get(f"checkpoint.{name}") if value is None else value for name, value in options.items()}
    return CheckpointConfig(**{name: value for name, value in fields.items() if value is not None})


def _found(path: Path) -> list[Checkpoint]:
    """A run's checkpoints, newest first, or the one that is named.

    Raises:
        CheckpointError: there is none.
    """
    from swinv2_scale.engine.checkpoint import MANIFEST, find, read

    if (path / MANIFEST).exists():
        return [read(path)]
    found = find(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{path} holds no complete checkpoint",
            "name a run directory that has saved one, or one of its checkpoints/step-XXXXXXXX",
        )
    return found
