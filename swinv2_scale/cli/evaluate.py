"""What launch/evaluate.py runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from swinv2_scale.cli.progress import progress_bar
from swinv2_scale.cli.train import default_run_dir, run_script, script_parser
from swinv2_scale.config.loader import LoadedConfig
from swinv2_scale.errors import ConfigError, ExitCode, printable

#: With more classes the table shows the worst of them; the JSON has all.
_MOST_SHOWN = 40
_WORST = 10


def evaluate(argv: list[str] | None = None) -> int:
    """``launch/evaluate.py``: a classifier's accuracy on all of data.validation."""
    parser = script_parser("Measure a classifier on data.validation, every sample once, with any number of processes.")
    add = parser.add_argument
    words = "a run, a checkpoint, or a weights file of any format (default: the run of this configuration)"
    add("--weights", type=Path, metavar="RUN_OR_FILE", help=words)
    add("--best", action="store_true", help="of a run, what evaluation.metric found best, not the newest checkpoint")
    add("--average", "--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    words = "where the JSON and the picture go, replaced (default: evaluation/ in the run)"
    add("--output", type=Path, metavar="DIR", help=words)
    return run_script(parser.parse_intermixed_args(argv), _run)


def _run(loaded: LoadedConfig, arguments: argparse.Namespace) -> ExitCode:
    from swinv2_scale.engine.evaluation_job import EvaluationOptions, run_evaluation

    run = default_run_dir(Path(arguments.config))
    if arguments.weights is None and not run.exists():
        raise ConfigError(f"{run} is where {arguments.config} is trained, and isn't there", "say which: --weights RUN")
    if arguments.weights is not None and (arguments.weights / "checkpoints").is_dir():
        run = arguments.weights
    options = EvaluationOptions(
        arguments.weights or run, arguments.output or run / "evaluation", arguments.best, arguments.average
    )
    with progress_bar("evaluating", rate_of="images") as show:
        found = run_evaluation(loaded, options, show)
    if found:
        _print(found.report)
        print(printable(f"numbers: {found.json}" + (f"   picture: {found.picture}" if found.picture else "")))
    return ExitCode.DONE


def _print(report: dict[str, Any]) -> None:
    classes = [row for row in report["per_class"] if row["samples"]]
    title = "accuracy by class"
    if len(classes) > _MOST_SHOWN:
        title = f"the {_WORST} classes of {len(classes)} that are told worst"
        classes = sorted(classes, key=lambda row: row["right"] / row["samples"])[:_WORST]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for header in ("label", "class", "samples", "right"):
        table.add_column(header, justify="left" if header == "class" else "right")
    for row in classes:
        share = row["right"] / row["samples"]
        table.add_row(str(row["label"]), printable(row["name"]), str(row["samples"]), f"{share:.2%}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table, markup=False)
    metrics = report["metrics"]
    words = f"top-1 {metrics['top1']:.3%}   top-5 {metrics['top5']:.3%}   loss {metrics['loss']:.5f}"
    left_out = f", {report['damaged']} damaged ones left out" if report["damaged"] else ""
    print(f"\n{words}   {report['samples']:,} samples{left_out}")
