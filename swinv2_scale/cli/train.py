"""What the launch scripts run."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from swinv2_scale.cli.arguments import ArgumentParser, positive_int
from swinv2_scale.config.loader import LoadedConfig, load_config
from swinv2_scale.errors import ConfigError, ExitCode, ScaleError
from swinv2_scale.launchers.place import adopt


def pretrain(argv: list[str] | None = None) -> int:
    """``launch/pretrain.py``: a stage that begins with drawn weights, or goes on from others' (``init_from``)."""
    return run_script(train_parser("Pre-train a Swin V2 with SimMIM.").parse_intermixed_args(argv), _run)


def finetune(argv: list[str] | None = None) -> int:
    """``launch/finetune.py``: a stage that begins with the weights of another one; without ``init_from`` it stops."""
    return run_script(train_parser("Go on from trained weights.").parse_intermixed_args(argv), _finetune)


def default_run_dir(config: Path) -> Path:
    """``configs/quickstart/simmim.yaml`` -> ``runs/quickstart-simmim``."""
    folder = config.parent.name
    return Path("runs") / (config.stem if folder in ("", "configs") else f"{folder}-{config.stem}")


def script_parser(description: str) -> ArgumentParser:
    """The options of all launch scripts."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers put it first
    parser.add_argument("--config", "--cfg", required=True, metavar="FILE", help="the stage's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    return parser


def train_parser(description: str) -> ArgumentParser:
    """The options of those that train."""
    parser = script_parser(description)
    parser.add_argument("--run-dir", metavar="DIR", help="where everything is written (default: runs/NAME-OF-CONFIG)")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="stop cleanly, with a checkpoint, after step N")
    parser.add_argument("--resume", choices=("auto", "required", "never"), default="auto")
    return parser


def run_dir_of(arguments: argparse.Namespace) -> Path:
    """The run directory that a launch script's arguments mean."""
    return Path(arguments.run_dir) if arguments.run_dir else default_run_dir(Path(arguments.config))


def run_script(arguments: argparse.Namespace, run: Callable[[LoadedConfig, argparse.Namespace], ExitCode]) -> int:
    """Validate before torch is imported, run, and turn errors into exit codes."""
    try:
        adopt()
    except ScaleError as error:  # which process this is isn't known: each speaks for itself
        print(error.report, file=sys.stderr, flush=True)
        return int(error.exit_code)
    try:
        loaded = load_config(arguments.config, arguments.overrides)
        return int(run(loaded, arguments))
    except ScaleError as error:
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        # An error that ranks don't share is most often one of a node: one rank of each node says it.
        is_speaker = rank == 0 or (local_rank == 0 and not error.is_shared)
        if is_speaker or error.exit_code == ExitCode.PEER_LOST:
            with contextlib.suppress(OSError):  # a launcher that died took the other end of the pipe with it
                print(error.report, file=sys.stderr, flush=True)
        return int(error.exit_code)


def _finetune(loaded: LoadedConfig, arguments: argparse.Namespace) -> ExitCode:
    if loaded.config.init_from is None:
        raise ConfigError(
            f"{loaded.path} has no init_from: fine-tuning goes on from trained weights",
            "set init_from to a run, a checkpoint or a weights file, or start launch/pretrain.py",
        )
    return _run(loaded, arguments)


def _run(loaded: LoadedConfig, arguments: argparse.Namespace) -> ExitCode:
    from swinv2_scale.engine.job import JobOptions, run_job

    return run_job(loaded, JobOptions(run_dir_of(arguments), arguments.steps, arguments.resume))
