"""``swinv2-scale config check|explain``. Answers in a second or two: torch is never imported."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swinv2_scale.config.loader import flatten, load_config
from swinv2_scale.config.rules import resume_policy
from swinv2_scale.config.source import format_value
from swinv2_scale.errors import ConfigError, printable


def add_commands(commands: Any) -> None:
    config = commands.add_parser("config", help="check a configuration, or explain where its values come from")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="find every problem at once")
    explain = actions.add_parser("explain", help="every value, where it was set, what it overrode")
    for parser, run in ((check, _check), (explain, _explain)):
        parser.add_argument("file")
        parser.add_argument("overrides", nargs="*", metavar="key.path=value")
        parser.set_defaults(run=run)
    explain.add_argument("--key", metavar="KEY", help="only this key, or the keys of this section")


def _check(arguments: argparse.Namespace) -> None:
    loaded = load_config(arguments.file, arguments.overrides)
    model = loaded.config.model
    print(f"{arguments.file}: valid")
    print(f"  {model.variant}: width {model.embed_dim}, depths {list(model.depths)}, heads {list(model.num_heads)}")
    maps = ", ".join("x".join(map(str, size)) for size in model.stage_maps)
    print(f"  image {format_value(model.image_size)}, window {format_value(model.window_size)}, maps {maps}")


def _explain(arguments: argparse.Namespace) -> None:
    loaded = load_config(arguments.file, arguments.overrides)
    table = Table("key", "value", "set by", "overrode", "on resume")
    wanted = tuple(arguments.key.split(".")) if arguments.key else ()
    rows = {key: value for key, value in flatten(loaded.config).items() if key[: len(wanted)] == wanted}
    if not rows:
        raise ConfigError(
            f"there is no key {arguments.key!r}", f"swinv2-scale config explain {arguments.file} lists all"
        )
    for key, value in rows.items():
        dotted = ".".join(key)
        overrode = "; ".join(loaded.overridden(key))
        cells = (dotted, format_value(value), loaded.origin(key), overrode, resume_policy(dotted))
        table.add_row(*(Text(printable(cell)) for cell in cells))  # as they are: brackets are no markup
    console = Console()
    # Piped, a table must not be cut to 80 columns.
    (console if console.is_terminal else Console(width=240)).print(table)
