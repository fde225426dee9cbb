"""``swinv2-scale kernels``: the fused attention of CPUs, compiled before any job needs it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from swinv2_scale.errors import ClusterError


def add_commands(commands: Any) -> None:
    kernels = commands.add_parser("kernels", help="compile the fused attention for CPUs, and say what there is")
    actions = kernels.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="compile it for this torch, unless that has been done")
    build.add_argument("--optional", action="store_true", help="where it fails, say so in one line and end well")
    build.set_defaults(run=_build)
    status = actions.add_parser("status", help="what is built, what this CPU runs, what backend auto means here")
    status.set_defaults(run=_status)


def _build(arguments: argparse.Namespace) -> None:
    from swinv2_scale.models.ops import build

    found = build.find()
    if found is not None:
        print(f"fused attention: built already, {found}")
        return
    started = time.monotonic()
    try:
        path = build.build()
    except ClusterError as error:
        if not arguments.optional:
            raise
        print(f"fused attention: not built, {error.message.splitlines()[0]}; model.attention.backend auto takes eager")
        return
    print(f"fused attention: built in {time.monotonic() - started:.0f} s, {path}")


def _status(arguments: argparse.Namespace) -> None:
    from swinv2_scale.models.ops import build
    from swinv2_scale.models.ops.attend import choose

    found = build.find()
    print(f"compiler: {build.compiler() or 'none'}")
    print(f"library:  {found or 'not built; swinv2-scale kernels build'}")
    print(f"kernels:  {', '.join(build.variants())}")
    print(f"auto:     {choose()}")
