"""What the launch scripts run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from swinv2_scale.cli.arguments import ArgumentParser, positive_int
from swinv2_scale.config.loader import LoadedConfig, load_config
from swinv2_scale.errors import ExitCode, ScaleError


def pretrain(argv: list[str] | None = None) -> int:
    """``launch/pretrain.py``: parse, validate before torch is imported, run, and turn errors into exit codes."""
    arguments = _parser("Pre-train a Swin V2 with SimMIM.").parse_intermixed_args(argv)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    try:
        loaded = load_config(arguments.config, arguments.overrides)
        code = int(_run(loaded, arguments))
    except ScaleError as error:
        # An error that ranks don't share is most often one of a node: one rank of each node says it.
        is_speaker = rank == 0 or (local_rank == 0 and not error.is_shared)
        if is_speaker or error.exit_code == ExitCode.PEER_LOST:
            print(error.report, file=sys.stderr, flush=True)
        code = int(error.exit_code)
    return code


def _run(loaded: LoadedConfig, arguments: argparse.Namespace) -> ExitCode:
    from swinv2_scale.engine.job import JobOptions, run_job

    run_dir = Path(arguments.run_dir) if arguments.run_dir else default_run_dir(loaded.path)
    return run_job(loaded, JobOptions(run_dir, arguments.steps, arguments.resume))


def default_run_dir(config: Path) -> Path:
    """``configs/quickstart/simmim.yaml`` -> ``runs/quickstart-simmim``."""
    folder = config.parent.name
    return Path("runs") / (config.stem if folder in ("", "configs") else f"{folder}-{config.stem}")


def _parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers put it first
    parser.add_argument("--config", "--cfg", required=True, metavar="FILE", help="the stage's YAML file")
    parser.add_argument("--run-dir", metavar="DIR", help="where everything is written (default: runs/NAME-OF-CONFIG)")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="stop cleanly, with a checkpoint, after step N")
    parser.add_argument("--resume", choices=("auto", "required", "never"), default="auto")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    return parser
