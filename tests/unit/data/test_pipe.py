"""``pipe:`` shards: one allowed program, run once, never a shell."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.errors import ConfigError, DataError, SampleError
from tests.support.remote_shard import (
    CONTENT,
    IDENTITY,
    SILENCE_S,
    SIZE,
    files,
    in_child,
    read_all,
)


def script(tmp_path: Path, text: str) -> tuple[str, dict[str, Any]]:
    """A ``pipe:`` of a Python program, and the options that allow it. A line is added to ``runs`` for each start."""
    program = tmp_path / "program.py"
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    header = f"import os, sys, time\n{count}\ndata = open({str(tmp_path / 'x.tar')!r}, 'rb').read()\n"
    program.write_text(header + "out = sys.stdout.buffer\n" + text)
    (tmp_path / "x.tar").write_bytes(CONTENT)
    return f"pipe:{sys.executable} -S {program}", {"allowed_commands": (sys.executable,)}


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text())


def test_a_command_is_run_once_for_all_blocks_and_all_processes(tmp_path: Path) -> None:
    location, options = script(tmp_path, "out.write(data)")

    def read() -> None:
        remote = files(tmp_path, **options)
        for start in random.Random(os.getpid()).sample(range(0, SIZE - 500, 500), 20):
            assert remote.read(location, IDENTITY, SIZE, start, 500) == CONTENT[start : start + 500]

    for process in [in_child(read) for _ in range(4)]:
        process.join()
        assert process.exitcode == 0
    assert runs(tmp_path) == 1


def test_a_command_is_streamed_and_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(CONTENT)
    remote = files(tmp_path, allowed_commands=("cat",))
    location = f"pipe:cat '{tmp_path}/a b.tar'"
    assert b"".join(remote.stream(location)) == CONTENT
    assert remote.read_whole(location, SIZE) == CONTENT
    assert remote.list_names(location) is None
    with pytest.raises(DataError, match="more than 100 bytes"):
        remote.read_whole(location, 100)
    with pytest.raises(DataError, match="isn't known before it has been run"):
        remote.size(location)


BROKEN = {
    "fails": ("out.write(data); out.flush(); sys.exit('no such\\nbucket')", "ended with code 1: no such bucket"),
    "is killed": ("os.kill(os.getpid(), 9)", r"ended with code -9: it gave no reason"),
    "gives too little": ("out.write(data[:-1])", f"{SIZE - 1} bytes came, the manifest says {SIZE}"),
    "gives too much": ("out.write(data + data)", f"more than the {SIZE} bytes of the manifest came"),
    "falls silent": ("out.write(data[:9000]); out.flush(); time.sleep(60)", "was silent for 0.3 s"),
    "complains at length": ("sys.stderr.write('x' * 10**6 + 'at last'); sys.exit(2)", "x{900}at last"),
}


@pytest.mark.parametrize(("text", "cause"), BROKEN.values(), ids=BROKEN.keys())
def test_a_command_that_fails_is_run_again_and_nothing_of_it_is_kept(tmp_path: Path, text: str, cause: str) -> None:
    location, options = script(tmp_path, text)
    if "silent" in cause:
        options["timeout_s"] = SILENCE_S
    with pytest.raises(DataError, match=rf"{cause}.*\(asked 2 times\)") as caught:
        files(tmp_path, **options, retries=1).read(location, IDENTITY, SIZE, 0, 10)
    assert not isinstance(caught.value, SampleError)
    assert runs(tmp_path) == 2
    assert list((tmp_path / "cache").glob("*.block")) == []


def test_a_command_that_recovers_is_read(tmp_path: Path) -> None:
    text = f"out.write(data if os.path.getsize({str(tmp_path / 'runs')!r}) > 2 else data[:20_500])"
    location, options = script(tmp_path, text)
    assert read_all(files(tmp_path, **options), location) == CONTENT
    assert runs(tmp_path) == 3


def test_a_stream_from_a_failing_command_ends_in_an_error(tmp_path: Path) -> None:
    location, options = script(tmp_path, "out.write(data); sys.exit(3)")
    with pytest.raises(DataError, match="ended with code 3"):
        list(files(tmp_path, **options).stream(location))
    with pytest.raises(DataError, match="No such file or directory"):
        list(files(tmp_path, allowed_commands=("no-such-program",)).stream("pipe:no-such-program x"))


def test_a_reader_that_stops_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    text = f"import subprocess\nc = subprocess.Popen([sys.executable, '-S', '-c', {child!r}])\n"
    location, options = script(tmp_path, text + "out.write(b'%d ' % c.pid); out.flush(); time.sleep(60)")
    stream = files(tmp_path, **options).stream(location)
    pid = int(next(stream))
    stream.close()
    status = Path(f"/proc/{pid}/status")
    for _ in range(200):  # the kill is under way
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} goes on")


@pytest.mark.parametrize(
    "command",
    [
        "cat {x}; touch {canary}",
        "cat {x} | touch {canary}",
        "cat {x} && touch {canary}",
        "cat {x} > {canary}",
        "cat {x} $(touch {canary})",
        'cat {x} "$(touch {canary})"',
        "cat {x} `touch {canary}`",
        "cat {x}\ntouch {canary}",
        "touch {canary}",
        "/bin/cat {x}",
        "sh -c 'touch {canary}'",
        "CAT {x}",
        "cat '{x}",
        "",
    ],
)
def test_what_is_not_one_allowed_program_is_not_started(tmp_path: Path, command: str) -> None:
    (tmp_path / "x.tar").write_bytes(CONTENT)
    canary = tmp_path / "canary"
    location = "pipe:" + command.format(x=tmp_path / "x.tar", canary=canary)
    remote = files(tmp_path, allowed_commands=("cat",))
    with pytest.raises(ConfigError):
        read_all(remote, location)
    with pytest.raises(ConfigError):
        list(remote.stream(location))
    assert not canary.exists()


def test_no_command_is_allowed_until_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"would start 'cat', and data.remote.allowed_commands has nothing") as caught:
        read_all(files(tmp_path), "pipe:cat x.tar")
    assert "data.remote.allowed_commands=[cat]" in caught.value.next_step


def test_shell_characters_in_quotes_are_ordinary_arguments(tmp_path: Path) -> None:
    (tmp_path / "a&b;$(c).tar").write_bytes(CONTENT)
    remote = files(tmp_path, allowed_commands=("cat",))
    assert read_all(remote, f"pipe:cat '{tmp_path}/a&b;$(c).tar'") == CONTENT


def test_a_shard_that_the_cache_cannot_hold_whole_is_refused_before_it_is_piped(tmp_path: Path) -> None:
    location, options = script(tmp_path, "out.write(data)")
    with pytest.raises(ConfigError, match=r"gives all of its 34567 bytes at once, more than data.remote.cache_bytes"):
        read_all(files(tmp_path, **options, cache_bytes=40_000), location)
    assert not (tmp_path / "runs").exists()
