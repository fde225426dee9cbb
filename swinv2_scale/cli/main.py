"""``swinv2-scale``: one subcommand a room of this folder; each imports what it needs when it is called."""

from __future__ import annotations

import argparse
import sys

from swinv2_scale.cli import (
    checkpoint,
    config,
    doctor,
    kernels,
    launch,
    models,
    plan,
    probe,
    recipe,
    shards,
    status,
    submit,
)
from swinv2_scale.cli.arguments import ArgumentParser
from swinv2_scale.errors import ScaleError


def make_parser() -> ArgumentParser:
    """Every command and its options."""
    parser = ArgumentParser("swinv2-scale", "Swin Transformer V2, from Tiny to SwinV2-G.")
    # The deepspeed launcher's, before the words of `deepspeed --module swinv2_scale COMMAND`.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    config.add_commands(commands)
    plan.add_commands(commands)
    shards.add_commands(commands)
    models.add_commands(commands)
    probe.add_commands(commands)
    checkpoint.add_commands(commands)
    doctor.add_commands(commands)
    status.add_commands(commands)
    submit.add_commands(commands)
    recipe.add_commands(commands)
    launch.add_commands(commands)
    kernels.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and turn typed errors into one message and an exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # `swinv2-scale ... | head`
        sys.stderr.close()
    return 0
