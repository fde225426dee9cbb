"""``swinv2-scale submit CONFIG --nodes 8``: a stage as a Slurm job, checked before it waits in a queue."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.config.loader import LoadedConfig, load_config
from swinv2_scale.errors import ClusterError, ConfigError, printable

_SLURM = Path(__file__).resolve().parents[2] / "launch" / "slurm"
#: Slurm tells the ranks 300 s before the end, or a minute earlier; before that they start, and train.
_SHORTEST_S = 600
#: What sbatch reads as its own environment is in the site file; no word of ours becomes a part of this line.
_SBATCH = 'source "$1" >&2 && shift && exec sbatch "$@"'


def add_commands(commands: Any) -> None:
    words = "hand a stage to Slurm: launch/slurm/pretrain.sbatch (or finetune.sbatch), checked and filled in"
    parser = commands.add_parser("submit", help=words)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the stage's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration values")
    add_size(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME-OF-CONFIG")
    parser.add_argument("--after", type=_job, metavar="JOB", help="start when this job has finished its run")
    parser.add_argument("--print", action="store_true", help="show the file instead of submitting it")
    parser.add_argument("--parsable", action="store_true", help="say the job's number, and nothing else")
    parser.set_defaults(run=_submit)


def add_size(parser: argparse.ArgumentParser) -> None:
    """The options that say what a job gets, and where."""
    parser.add_argument("--nodes", type=positive_int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=positive_int, default=8, metavar="N", help="and tasks (default: 8)")
    parser.add_argument("--cpus-per-task", type=positive_int, default=8, metavar="N", help="cores a GPU (default: 8)")
    parser.add_argument("--time", type=_time, default="24:00:00", help="limit of each life, as Slurm writes it (a day)")
    parser.add_argument("--site", type=Path, metavar="FILE", help="default: launch/slurm/site.sh")


@dataclass(frozen=True)
class Submission:
    """A batch file that is checked and filled in, and what else it is submitted with."""

    text: str
    site: Path
    run: Path

    def queue(self, after: str | None = None) -> str:
        """Hand it to sbatch; the job's number.

        Args:
            after: the number of a job that has to finish its run first.

        Raises:
            ClusterError: there is no Slurm here, or it refused.
            ConfigError: the run directory can't be made.
        """
        if shutil.which("sbatch") is None:
            raise ClusterError("there is no sbatch on this machine", "submit where Slurm is, or show the file: --print")
        try:
            self.run.mkdir(parents=True, exist_ok=True)  # so that `status` knows it from here on
        except OSError as error:
            raise ConfigError(f"cannot make the run directory {self.run}: {error}", "choose another one") from error
        return _hand_over(self.text, self.site, after)

    def log(self, job: str) -> Path:
        """Where Slurm puts what the job prints."""
        return Path.cwd() / f"slurm-{_job_name(self.run)}-{job}.out"


def prepare(arguments: argparse.Namespace) -> Submission:
    """Check a stage and fill in its batch file.

    Args:
        arguments: ``config``, ``overrides``, ``run_dir`` and those of add_size().

    Raises:
        ConfigError: the configuration, the size or a name can't be submitted.
        ClusterError: this isn't a checkout.
    """
    from swinv2_scale.cli.train import default_run_dir

    site = arguments.site or _SLURM / "site.sh"
    if not site.is_file():
        raise ConfigError(f"there is no site file {site}", "copy launch/slurm/site.sh and edit it")
    run = arguments.run_dir or default_run_dir(arguments.config)
    loaded, overrides = _checked(arguments)
    return Submission(_filled(arguments, loaded, overrides, run, site), site, run)


def _submit(arguments: argparse.Namespace) -> None:
    submission = prepare(arguments)
    if arguments.print:
        print(submission.text, end="")
        return
    job = submission.queue(arguments.after)
    if arguments.parsable:
        print(job)
        return
    run = shlex.quote(str(submission.run))
    print(printable(f"job {job}: {arguments.config} on {arguments.nodes} x {arguments.gpus_per_node} GPUs"))
    print(printable(f"  log     {submission.log(job)}"))
    print(printable(f"  follow  swinv2-scale status {run}"))
    print(printable(f"  stop    swinv2-scale stop {run}"))


def _checked(arguments: argparse.Namespace) -> tuple[LoadedConfig, list[str]]:
    """The configuration as the job will read it, and the overrides that it is given.

    Raises:
        ConfigError: it is wrong, or not of so many nodes, or its batch can't be dealt to so many GPUs.
    """
    from swinv2_scale.plan.batch import accumulation_steps

    nodes, world_size = arguments.nodes, arguments.nodes * arguments.gpus_per_node
    loaded = load_config(arguments.config, arguments.overrides)
    for key, asked in (("num_nodes", nodes), ("world_size", world_size)):
        written = getattr(loaded.config.cluster, key)
        if written not in (None, asked):
            raise ConfigError(
                f"{loaded.origin(('cluster', key))}: cluster.{key} is {written}, the job would have {asked}",
                "correct --nodes or --gpus-per-node, or the key",
            )
    accumulation_steps(loaded.config, world_size)
    overrides = [*arguments.overrides, f"cluster.num_nodes={nodes}", f"cluster.world_size={world_size}"]
    return load_config(arguments.config, overrides), overrides


def _filled(arguments: argparse.Namespace, loaded: LoadedConfig, overrides: list[str], run: Path, site: Path) -> str:
    """The shipped file with this job's values, each in the line that the file has for it.

    Raises:
        ClusterError: this isn't a checkout, so there is no such file.
        ConfigError: a value holds control characters.
    """
    shipped = _SLURM / ("finetune.sbatch" if loaded.config.init_from else "pretrain.sbatch")
    try:
        lines = shipped.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ClusterError(f"cannot read {shipped}: {error}", "run it from a checkout of the repository") from error
    values = {
        "#SBATCH --job-name=": _job_name(run),
        "#SBATCH --nodes=": str(arguments.nodes),
        "#SBATCH --ntasks-per-node=": str(arguments.gpus_per_node),
        "#SBATCH --gpus-per-node=": str(arguments.gpus_per_node),
        "#SBATCH --cpus-per-task=": str(arguments.cpus_per_task),
        "#SBATCH --time=": arguments.time,
        "repository=": shlex.quote(str(_SLURM.parents[1])),
        "site=": shlex.quote(str(site.absolute())),
        "config=": shlex.quote(str(arguments.config.absolute())),
        "run=": shlex.quote(str(run.absolute())),
        "arguments=": f"({shlex.join(overrides)})",
    }
    for start, value in values.items():
        if printable(value) != value:
            raise ConfigError(f"control characters in {value!r}", "such names can't be written into a batch file")
        (number,) = (number for number, line in enumerate(lines) if line.startswith(start))
        lines[number] = start + value
    return "\n".join(lines) + "\n"


def _hand_over(text: str, site: Path, after: str | None) -> str:
    """Submit; the job's number.

    Raises:
        ClusterError: sbatch refused, with its words.
    """
    options = ["--parsable"]
    if after:
        options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    command = ["bash", "-c", _SBATCH, "submit", str(site.absolute()), *options]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ, check=False)  # noqa: S603
    job = done.stdout.strip().split(";")[0]
    if done.returncode or not re.fullmatch(r"\d+", job):
        said = (done.stderr or done.stdout).strip()
        raise ClusterError(f"sbatch refused the job: {said}", f"correct the options or {site}; see the file: --print")
    return job


def _job_name(run: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", run.absolute().name)


def _job(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no job's number")
    return text


def _time(text: str) -> str:
    """``90``, ``1:30:00``, ``2-12``, ``2-12:30``: minutes, h:m:s, days-hours[:m[:s]], as sbatch takes them."""
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,5})(?::(\d{1,5}))?(?::(\d{1,5}))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, as 90, 12:00:00 or 2-12:00:00 are")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    # Without days one number is minutes and two are minutes and seconds; with them the first is hours.
    hours_first = [0, *numbers] if days is None and len(numbers) < 3 else numbers
    hours, minutes, seconds = [*hours_first, 0, 0, 0][:3]
    total_s = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if total_s <= _SHORTEST_S:
        raise argparse.ArgumentTypeError(f"{text} is no more than the {_SHORTEST_S} s in which a job starts and saves")
    return text
