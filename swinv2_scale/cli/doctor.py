"""``swinv2-scale doctor``: whether a job can run here; in every process of the job that a launcher starts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swinv2_scale.cli.train import default_run_dir
from swinv2_scale.config.loader import LoadedConfig, load_config
from swinv2_scale.errors import ClusterError, ConfigError, printable
from swinv2_scale.launchers.place import adopt

if TYPE_CHECKING:
    from swinv2_scale.engine.doctor.examine import Verdict

_EPILOG = """
Start it as the job will be started, so that it looks at every node:
  torchrun --nproc-per-node 8 -m swinv2_scale doctor CONFIG
  deepspeed --hostfile hosts --module swinv2_scale doctor CONFIG
  srun swinv2-scale doctor CONFIG
It ends with 0 (ready) or 78, in less than a minute.
"""
_WORDS = ("ok", "warning", "PROBLEM")
_STYLES = ("green", "yellow", "bold red")


def add_commands(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check every node before a job: versions, data, disks, memory, network",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help="the stage's YAML file; without: nodes and network")
    doctor.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    doctor.add_argument("--run-dir", metavar="DIR", help="where the job will write (default: runs/NAME-OF-CONFIG)")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    adopt()
    try:
        from swinv2_scale.engine.doctor.examine import Examination
    except ImportError as error:  # a library of the system that a package needs, most often
        raise ClusterError(
            f"a job can't begin on {gethostname()}: {error}", "install the package, with what it needs, on every node"
        ) from error

    loaded: LoadedConfig | ConfigError | None = None
    run_dir = Path(arguments.run_dir) if arguments.run_dir else None
    if arguments.config:
        run_dir = run_dir or default_run_dir(Path(arguments.config))
        try:
            loaded = load_config(arguments.config, arguments.overrides)
        except ConfigError as error:
            loaded = error
    show = _print_json if arguments.json else _print_table
    sys.exit(int(Examination(loaded, run_dir, show).run()))


def _print_json(verdict: Verdict) -> None:
    checks = [
        {
            "check": finding.check,
            "state": finding.state.name.lower(),
            "found": finding.found,
            "advice": finding.advice,
            "facts": dict(finding.facts),
        }
        for finding in verdict.findings
    ]
    head = {"ready": verdict.is_ready, "processes": verdict.num_processes, "seconds": round(verdict.seconds, 1)}
    print(json.dumps({**head, "checks": checks}, indent=1), flush=True)


def _print_table(verdict: Verdict) -> None:
    from swinv2_scale.engine.doctor.findings import State

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for finding in verdict.findings:
        cell = Text(printable(finding.found))
        if finding.advice:
            cell.append(f"\n-> {printable(finding.advice)}", style="bold")
        table.add_row(Text(_WORDS[finding.state], style=_STYLES[finding.state]), Text(finding.check), cell)
    console = Console()
    # Piped, a table must not be cut to 80 columns.
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    counts = [(verdict.count(State.PROBLEM), "problem"), (verdict.count(State.WARNING), "warning")]
    said = " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)
    word = "ready" if verdict.is_ready else "not ready"
    processes = f"{verdict.num_processes} process{'es' * (verdict.num_processes > 1)}"
    print(f"{word}{': ' * bool(said)}{said} ({processes}, {verdict.seconds:.1f} s)", flush=True)
