"""argparse with our exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from swinv2_scale.errors import ExitCode


class ArgumentParser(argparse.ArgumentParser):
    """Abbreviations are off (a new option would change their meaning); usage errors exit like a bad configuration."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options: object) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)  # type: ignore[arg-type]

    #: ``key.path=value`` may stand anywhere, also behind options, which argparse alone doesn't allow in a subcommand.
    takes_overrides = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; what it leaves over and isn't an option is an override."""
        found, rest = super().parse_known_args(args, namespace)
        if self.takes_overrides:
            found.overrides = [*found.overrides, *(word for word in rest if not word.startswith("-"))]
            rest = [word for word in rest if word.startswith("-")]
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(int(ExitCode.BAD_CONFIG))


def positive_int(text: str) -> int:
    """A ``type=`` for counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
