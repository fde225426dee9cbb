"""``pipe:COMMAND``: what one program prints, read as a file. No shell is involved, and only allowed programs start."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
from collections.abc import Generator, Sequence

from swinv2_scale.errors import ConfigError

PIPE_PREFIX = "pipe:"
_CHUNK_BYTES = 2**20
_MAX_COMPLAINT_BYTES = 1000


def pipe_command(location: str, allowed: Sequence[str]) -> list[str]:
    """Program and arguments of a ``pipe:``.

    Args:
        allowed: programs by the very name that the location has to use: "aws" allows no "/tmp/aws".

    Raises:
        ConfigError: the program is none of these, or the command is written for a shell.
    """
    text = location.removeprefix(PIPE_PREFIX)
    # Only so that nobody is surprised: without a shell these would be ordinary arguments.
    expandable = re.sub(r"'[^']*'", "", text)
    if re.search(r"[$`]", expandable) or re.search(r"[|&;<>()\n]", re.sub(r'"[^"]*"', "", expandable)):
        raise ConfigError(
            f"{location!r} has shell syntax, but only one program is started, without a shell",
            "quote what is meant literally; for more than one program write a script and allow that",
        )
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{location!r} can't be split into words: {error}") from error
    program = command[0] if command else ""
    if program not in allowed:
        raise ConfigError(
            f"{location!r} would start {program!r}, and data.remote.allowed_commands has "
            f"{', '.join(allowed) or 'nothing'}",
            f"if you trust it: data.remote.allowed_commands=[{program}], or --allow-command {program} for shards index",
        )
    return command


def pipe_output(command: Sequence[str], timeout_s: float) -> Generator[bytes, None, None]:
    """What a program writes to standard output, piece by piece. Closing the generator kills it and its children.

    Raises:
        FileNotFoundError, PermissionError: it can't be started.
        TimeoutError: it wrote nothing for ``timeout_s``, neither output nor messages.
        ChildProcessError: it ended with another code than 0; with the end of what it wrote to standard error.
    """
    # allowed_commands named it; a group of its own, so that what it starts ends with it
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        complaint = b""
        try:
            with selectors.DefaultSelector() as selector:
                for file in (process.stdout, process.stderr):
                    assert file is not None
                    selector.register(file, selectors.EVENT_READ)
                while selector.get_map():
                    ready = selector.select(timeout_s)
                    if not ready:
                        raise TimeoutError(f"{command[0]} was silent for {timeout_s:g} s")
                    for key, _ in ready:
                        data = os.read(key.fd, _CHUNK_BYTES)
                        if not data:
                            selector.unregister(key.fileobj)
                        elif key.fileobj is process.stderr:
                            complaint = (complaint + data)[-_MAX_COMPLAINT_BYTES:]
                        else:
                            yield data
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"{command[0]} closed its output and didn't end within {timeout_s:g} s") from error
            if code:
                said = complaint.decode(errors="replace").strip()
                raise ChildProcessError(f"{command[0]} ended with code {code}: {said or 'it gave no reason'}")
        finally:
            # Not poll(): it would free the number of a program that has ended before its children.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
