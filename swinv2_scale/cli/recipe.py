"""``swinv2-scale recipe check|run|submit|status RECIPE``: stages in order, each a job with its own run directory."""

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

from swinv2_scale.cli.submit import add_size, prepare
from swinv2_scale.config.recipe import Recipe, Stage, load_recipe
from swinv2_scale.config.source import format_value
from swinv2_scale.errors import ClusterError, ConfigError, ExitCode, OutputError, printable

if TYPE_CHECKING:
    from swinv2_scale.engine.chain import StageStatus

_LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def add_commands(commands: Any) -> None:
    """Add ``recipe`` and what it can do to the parser's commands."""
    parser = commands.add_parser("recipe", help="stages in order: check them, run or submit them, see where they stand")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="every stage, and whether each can start from the one before")
    run = actions.add_parser("run", help="run the stages one after another; again, go on where they stopped")
    submit = actions.add_parser("submit", help="hand them to Slurm, each to start when the one before has finished")
    status = actions.add_parser("status", help="where each stage stands")
    for action, what in ((check, _check), (run, _run), (submit, _submit), (status, _status)):
        action.add_argument("recipe", type=Path, metavar="RECIPE", help="the recipe's YAML file")
        action.add_argument("overrides", nargs="*", metavar="key.path=value", help="of all stages")
        action.add_argument("--dir", type=Path, metavar="DIR", help="of the run directories (default: runs/NAME)")
        action.set_defaults(run=what)
    for action in (run, submit):
        words = "by name or number: 2, supervised_192, 2..4, ..supervised_640 (default: all)"
        action.add_argument("--stages", default="..", metavar="A..B", help=words)
    words = "what starts a stage's ranks (default: deepspeed): 'deepspeed --hostfile hosts', 'torchrun ..', 'python'"
    run.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help=words)
    add_size(submit)
    submit.add_argument("--print", action="store_true", help="show the batch files instead of submitting them")
    status.add_argument("--json", action="store_true", help="for scripts")


def _check(arguments: argparse.Namespace) -> None:
    recipe = _loaded(arguments)
    print(f"{recipe.path}: {len(recipe.stages)} stages that fit together, in {recipe.folder}")
    for stage in recipe.stages:
        start = stage.predecessor.name if stage.predecessor else stage.config.init_from or "drawn weights"
        print(printable(f"  {stage.number} {stage.name}: {_what(stage)}, {_steps(stage):,} steps, from {start}"))


def _run(arguments: argparse.Namespace) -> None:
    """The stages that aren't finished, in order.

    Raises:
        CheckpointError: what a stage starts from isn't there, or isn't finished.
        OutputError: a job has a stage's run directory.
        ClusterError: the launcher can't be started.
    """
    from swinv2_scale.cli.launch import note_stop_signals, supervise
    from swinv2_scale.engine.chain import check_start, stage_status
    from swinv2_scale.engine.run_dir import RunDirectory

    recipe = _loaded(arguments)
    launcher = shlex.split(arguments.launcher) or ["python"]
    launcher[0] = sys.executable if launcher[0] == "python" else _beside_python(launcher[0])
    again = shlex.join(["swinv2-scale", *sys.argv[1:]])
    chosen = _chosen(recipe, arguments.stages)
    told = note_stop_signals()
    for stage in chosen:
        found = stage_status(stage)
        title = f"stage {stage.number} of {len(recipe.stages)}, {stage.name}"
        if found.state == "running":
            raise OutputError(f"{title}: a job is using {stage.run_dir}", "wait for it, or: swinv2-scale stop RUN")
        if found.is_finished:
            print(printable(f"{title}: finished"), flush=True)
            continue
        if stage.predecessor is not None:
            finish = [*_again("run", recipe, stage.predecessor), "--launcher", arguments.launcher, *arguments.overrides]
            check_start(stage, shlex.join(finish), shlex.join(_command(stage.predecessor, launcher)))
        if told:
            _end(title, ExitCode.STOPPED, again)
        command = _command(stage, launcher)
        print(printable(f"{title}: {_what(stage)}"))
        print(printable(f"  {shlex.join(command)}"), flush=True)
        code = supervise(command, RunDirectory(stage.run_dir), told)
        if code:
            _end(title, code, again)
    last = chosen[-1]
    print(printable(f"done: {last.run_dir} holds the weights of {last.name}"), flush=True)


def _end(title: str, code: int, again: str) -> None:
    """Leave the chain with a stage's exit code."""
    if code == ExitCode.STOPPED:
        print(printable(f"{title}: stopped; this goes on from there: {again}"), flush=True)
    else:
        print(printable(f"{title}: ended with {code}; when that is corrected, this goes on: {again}"), file=sys.stderr)
    sys.exit(code)


def _submit(arguments: argparse.Namespace) -> None:
    """All stages that aren't finished, as jobs that wait for one another; every one is checked before the first.

    Raises:
        CheckpointError: what the first of them starts from isn't there, or isn't finished.
        OutputError: a job has a stage's run directory.
    """
    from swinv2_scale.engine.chain import check_start, stage_status

    arguments.dir = (arguments.dir or Path("runs") / arguments.recipe.stem).absolute()
    recipe = _loaded(arguments)
    waiting = []
    names = set()
    for stage in _chosen(recipe, arguments.stages):
        found = stage_status(stage)
        if found.state == "running":
            raise OutputError(f"{stage.name}: a job is using {stage.run_dir}", "wait for it, or: swinv2-scale stop RUN")
        if found.is_finished:
            print(printable(f"{stage.name}: finished"))
            continue
        if stage.predecessor is not None and stage.predecessor.name not in names:
            before, nodes = stage.predecessor, ["--nodes", str(arguments.nodes)]
            finish = [*_again("submit", recipe, before), *nodes, *arguments.overrides]
            repair = ["swinv2-scale", "submit", str(before.config_path), "--run-dir", str(before.run_dir), *nodes]
            check_start(stage, shlex.join(finish), shlex.join([*repair, *before.words]))
        names.add(stage.name)
        own_part = {"config": stage.config_path, "overrides": list(stage.words), "run_dir": stage.run_dir}
        waiting.append((stage, prepare(argparse.Namespace(**{**vars(arguments), **own_part}))))
    jobs: dict[str, str] = {}
    for stage, submission in waiting:
        if arguments.print:
            print(submission.text, end="")
            continue
        after = jobs.get(stage.predecessor.name) if stage.predecessor else None
        jobs[stage.name] = submission.queue(after)
        start = f", after job {after}" if after else ""
        print(printable(f"{stage.name}: job {jobs[stage.name]}{start}, log {submission.log(jobs[stage.name])}"))


def _status(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.chain import chain_status

    found = chain_status(_loaded(arguments))
    if arguments.json:
        print(json.dumps([status.to_json() for status in found], indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "model, image, window", "state", "step", "loss", "held-back", "run"):
        table.add_column(name, justify="right" if name in ("step", "loss") else "left")
    for status in found:
        table.add_row(*(Text(printable(cell)) for cell in _cells(status)))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table, highlight=False)


def _cells(status: StageStatus) -> tuple[str, ...]:
    stage, run = status.stage, status.run
    validation = run.validation if run else {}
    shown = (f"{k} {v:.4f}" if k == "loss" else f"{k} {v:.1%}" for k, v in validation.items())
    return (
        f"{stage.number} {stage.name}",
        _what(stage),
        status.state,
        f"{run.step if run else 0:,} of {_steps(stage):,}",
        "" if run is None or run.loss is None else f"{run.loss:.4f}",
        ", ".join(shown),
        str(stage.run_dir),
    )


def _loaded(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.dir, arguments.overrides)


def _what(stage: Stage) -> str:
    model = stage.config.model
    size, window = (format_value(value) for value in (model.image_size, model.window_size))
    return f"{stage.config.task.name}, {model.variant}, {size}/{window}"


def _steps(stage: Stage) -> int:
    return stage.config.optim.total_steps


def _chosen(recipe: Recipe, text: str) -> tuple[Stage, ...]:
    """The stages that ``--stages`` means.

    Raises:
        ConfigError: there is no such stage, or the last one is before the first.
    """
    numbers = {name: stage.number for stage in recipe.stages for name in (stage.name, str(stage.number))}
    first, dots, last = text.partition("..")
    bounds = (first or "1"), ((last or str(len(recipe.stages))) if dots else first)
    for name in bounds:
        if name not in numbers:
            known = ", ".join(f"{stage.number} {stage.name}" for stage in recipe.stages)
            raise ConfigError(f"--stages {text}: {recipe.path} has no stage {name!r}", f"it has {known}")
    start, end = (numbers[name] for name in bounds)
    if start > end:
        raise ConfigError(f"--stages {text}: stage {bounds[1]} is before {bounds[0]}", "write the earlier one first")
    return recipe.stages[start - 1 : end]


def _again(action: str, recipe: Recipe, last: Stage) -> list[str]:
    """The command that comes as far as a stage."""
    where = ["--dir", str(recipe.folder), "--stages", f"..{last.name}"]
    return ["swinv2-scale", "recipe", action, str(recipe.path), *where]


def _command(stage: Stage, launcher: list[str]) -> list[str]:
    """What a user would type.

    Raises:
        ClusterError: this isn't a checkout, so there is no launch script.
    """
    script = _LAUNCH / ("finetune.py" if stage.config.init_from else "pretrain.py")
    if not script.is_file():
        raise ClusterError(f"there is no {script}", "run it from a checkout of the repository")
    return [*launcher, str(script), "--config", str(stage.config_path), "--run-dir", str(stage.run_dir), *stage.words]


def _beside_python(program: str) -> str:
    """The program of this environment, whether it is activated or not."""
    own = Path(sys.executable).parent / program
    return str(own) if "/" not in program and own.is_file() else program
