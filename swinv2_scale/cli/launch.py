"""``swinv2-scale launch`` and ``stop``: a launcher's job that a signal can't break, and its end from afar."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from swinv2_scale.cli.train import run_dir_of, train_parser
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.preemption import on_stop_signals
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.status import RunStatus, read_status
from swinv2_scale.errors import ClusterError, ConfigError

_PERIOD_S = 1.0


def add_commands(commands: Any) -> None:
    """Add ``launch`` and ``stop`` to the parser's commands."""
    launch = commands.add_parser("launch", help="run a launcher's command so that one signal stops the job cleanly")
    launch.add_argument(
        "command", nargs=argparse.REMAINDER, help="deepspeed --hostfile hosts launch/pretrain.py --config FILE ..."
    )
    launch.set_defaults(run=_launch)
    stop = commands.add_parser("stop", help="let the job of a run save and stop, wherever its processes are")
    stop.add_argument("run_dir", metavar="RUN", type=Path)
    stop.set_defaults(run=_stop)


def _launch(arguments: argparse.Namespace) -> None:
    """The launcher's command, in a session of its own, which no Ctrl-C reaches.

    The first SIGTERM, SIGUSR1, SIGINT or SIGHUP becomes RUN/stop, which rank 0 sees on whichever host it runs; the
    launchers would rather kill the ranks, or leave them behind. The exit code is what the run directory says
    (``swinv2-scale status --exit-code``), as a launcher's own can be 0 for a dead job.

    Raises:
        ConfigError: the command holds no launch script, or its configuration can't be run.
        ClusterError: the launcher can't be started.
    """
    command: list[str] = arguments.command
    run = _run_of(command)
    sys.exit(supervise(command, run, note_stop_signals()))


def note_stop_signals() -> list[int]:
    """From here on a stop signal ends nothing; it is added to this list, and the first one is said."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not told:
            print(f"{signal.Signals(number).name}: the job saves a checkpoint and stops", flush=True)
        told.append(number)

    on_stop_signals(note)
    return told


def supervise(command: list[str], run: RunDirectory, told: list[int]) -> int:
    """Run a launcher's command to the end of its last rank.

    Args:
        told: as soon as anything is in it, the job is asked to stop.

    Returns:
        the exit code that the run directory says; the launcher's own if it ended before there was a job.

    Raises:
        ClusterError: the launcher can't be started.
    """
    earlier = _lives(run.root)
    try:
        # pdsh and ssh read a terminal if they are given one.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    except OSError as error:
        raise ClusterError(f"cannot start {command[0]}: {error.strerror}", "install it, or give its path") from error
    while (code := process.poll()) is None:
        _wait(run, told)
    if _lives(run.root) == earlier:  # it ended before there was a job, or another one has the run
        return code if code >= 0 else 128 - code
    if read_status(run.root).state == "running":
        print(f"{command[0]} has ended with {code}; its ranks save a checkpoint and stop", flush=True)
    while (status := read_status(run.root)).state == "running":
        _wait(run, told)
    print(_verdict(status), flush=True)
    return int(status.exit_code)


def _wait(run: RunDirectory, told: list[int]) -> None:
    if told:
        # Again and again: a job that is just starting deletes what an earlier one was asked.
        with suppress(OSError):
            run.stop.touch()
    time.sleep(_PERIOD_S)


def _verdict(status: RunStatus) -> str:
    reason = f": {status.reason}" if status.reason else ""
    return f"{status.path} is {status.state} at step {status.step} (exit code {int(status.exit_code)}){reason}"


def _run_of(command: list[str]) -> RunDirectory:
    """The run directory that a launcher's command will train in; its configuration is checked before it is started."""
    scripts = [index for index, word in enumerate(command) if Path(word).name in ("pretrain.py", "finetune.py")]
    if not scripts:
        raise ConfigError(
            f"{' '.join(command) or 'the command'} holds no launch/pretrain.py or launch/finetune.py",
            "swinv2-scale launch deepspeed --hostfile hosts launch/pretrain.py --config FILE",
        )
    training = train_parser("").parse_intermixed_args(command[scripts[0] + 1 :])
    load_config(training.config, training.overrides)
    return RunDirectory(run_dir_of(training))


def _lives(run: Path) -> list[str]:
    return [life.name for life in read_status(run).lives] if run.is_dir() else []


def _stop(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: no job is using the run.
    """
    status = read_status(arguments.run_dir)
    if status.state != "running":
        raise ConfigError(f"no job is using {status.path}: it is {status.state}", "swinv2-scale status shows more")
    RunDirectory(arguments.run_dir).stop.touch()
    print(f"{status.path} was asked to save and stop after step {status.step}; swinv2-scale status shows when it has")
