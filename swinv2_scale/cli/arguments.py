"""argparse with our exit codes."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from swinv2_scale.errors import ExitCode, printable


class ArgumentParser(argparse.ArgumentParser):
    """Abbreviations are off (a new option would change their meaning); usage errors exit like a bad configuration."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options: object) -> None:
        self._is_inside = False
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options may stand between words: before Python 3.12 ``CONFIG --nodes 8 key=value`` was refused."""
        # Commands, and what takes the rest of the line.
        is_ordered = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        if is_ordered or self._is_inside:
            return super().parse_known_args(args, namespace)
        return self.parse_known_intermixed_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._is_inside = True  # it parses twice
        try:
            return super().parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(int(ExitCode.BAD_CONFIG))


def positive_int(text: str) -> int:
    """A ``type=`` for counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
