"""``swinv2-scale shards write --resume``: the same bytes whatever happened on the way, and nothing half there."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY
from tests.unit.cli.photos import SHARD, digests, make_photos, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole") / "s"
    assert write(source, folder, *SHARD, "--processes", "1") == 0
    return digests(folder)


def in_a_child(work: Callable[[], int]) -> int:
    """Exit code of ``work`` in a process of its own, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- interrupted ------------------------------------------------------------------------------------------------------


#: What a process asks the file system for.
USES = ("open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir", "os.scandir")


def killed_at(call: int, work: Callable[[], int]) -> int:
    """``work`` in a child that kills itself (SIGKILL) before its so-manyth use of the file system.

    Returns:
        As ``in_a_child``; if it came to its end, how many uses there were.
    """

    def child() -> int:
        num_calls = 0

        def watch(event: str, _: object) -> None:
            nonlocal num_calls
            if event in USES:
                if num_calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                num_calls += 1

        sys.addaudithook(watch)
        assert work() == 0
        return num_calls

    return in_a_child(child)


def stopped_at(shard: int, number: signal.Signals, work: Callable[[], int]) -> int:
    """``work`` in a child that gets a signal when it is about to note that this many shards are finished."""

    def child() -> int:
        calls = iter(range(1, shard))

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith("progress.jsonl") and next(calls, None) is None:
                os.kill(os.getpid(), number)

        sys.addaudithook(watch)
        return work()

    return in_a_child(child)


def test_killed_anywhere_and_resumed_the_result_is_the_same_to_the_byte(
    source: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    num_calls = killed_at(-1, partial(write, source, tmp_path / "all", *SHARD, "--processes", "1"))
    assert 50 < num_calls < 250  # an exit code has eight bits
    for moment in [*range(0, num_calls - 8, 9), *range(num_calls - 8, num_calls)]:
        folder = tmp_path / str(moment)
        work = partial(write, source, folder, *SHARD, "--processes", "1")
        assert killed_at(moment, work) == -signal.SIGKILL
        if not folder.exists():
            killed_at(moment // 2 + 3, partial(work, "--resume"))  # once more, at another moment
        if not folder.exists():
            assert work("--resume") == 0
        assert digests(folder) == uninterrupted, moment


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_console_command_killed_with_its_workers_is_gone_on_with(
    source: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "swinv2_scale", "shards", "write", str(source), str(tmp_path / "s"), *SHARD]
    command += ["--processes", "2", "--resume"]
    progress = tmp_path / "s.part" / "progress.jsonl"
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not progress.exists() or progress.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(workers) == 2
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end, "workers outlived their parent"
        time.sleep(0.01)
    assert not (tmp_path / "s").exists()
    assert write(source, tmp_path / "s", *SHARD, "--resume") == 0
    assert digests(tmp_path / "s") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_with_85_and_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    uninterrupted: dict[str, str],
    number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = partial(write, source, tmp_path / "s", *SHARD, "--processes", "2")
    assert stopped_at(3, number, work) == 85
    assert f"{tmp_path}/s.part, go on with --resume" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()
    assert write(source, tmp_path / "s", *SHARD, "--resume") == 0
    assert digests(tmp_path / "s") == uninterrupted


def test_a_full_disk_ends_with_73_and_what_is_finished_stays(
    source: Path, tmp_path: Path, uninterrupted: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    def child() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the larger images make larger shards
        return write(source, tmp_path / "s", *SHARD)

    assert in_a_child(child) == 73
    assert "go on with --resume" in capfd.readouterr().err
    assert write(source, tmp_path / "s", *SHARD, "--resume") == 0
    assert digests(tmp_path / "s") == uninterrupted


# --- refusals ---------------------------------------------------------------------------------------------------------


def begun(source: Path, folder: Path, *options: str) -> Path:
    """What a job leaves that was killed after some shards."""
    work = partial(write, source, folder, *SHARD, *options, "--processes", "1")
    assert stopped_at(3, signal.SIGKILL, work) == -signal.SIGKILL
    part = folder.with_name(folder.name + ".part")
    assert (part / "progress.jsonl").read_bytes().count(b"\n") == 2
    return part


def test_nothing_that_exists_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    for option in ((), ("--resume",)):
        assert write(source, tmp_path / "s", *option) == 73
        assert "exists already" in capsys.readouterr().err
    part = begun(source, tmp_path / "t")
    before = digests(part / "shards")
    assert write(source, tmp_path / "t", *SHARD) == 73
    error = capsys.readouterr().err
    assert "--resume" in error
    assert f"remove {part}" in error
    assert digests(part / "shards") == before


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "s.part").mkdir()
    (tmp_path / "s.part" / "thesis.tex").write_text("precious")
    assert write(source, tmp_path / "s", "--resume") == 73
    assert [path.name for path in tmp_path.rglob("*")] == ["s.part", "thesis.tex"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "1"), "seed was 0, is 1"),
        (("--no-shuffle",), "seed was 0, is None"),
        (("--short-side", "20"), "short_side was None, is 20"),
        (("--bytes-per-shard", "1GB"), "bytes_per_shard was 1073741824, is 1000000000"),
        (("--no-verify",), "verify was True, is False"),
    ],
)
def test_going_on_with_other_options_ends_with_78_and_names_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    begun(source, tmp_path / "s")
    assert write(source, tmp_path / "s", *SHARD, *options, "--resume") == 78
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "class 1" / "new.jpg").write_bytes(b"x"), "new.jpg"),
        (lambda folder: (folder / "class 2" / "29.v1.jpg").unlink(), "29.v1.jpg"),
        (lambda folder: (folder / "class 2" / "29.v1.jpg").write_bytes(b"x"), "29.v1.jpg"),
        (lambda folder: os.utime(folder / "class 2" / "29.v1.jpg"), "29.v1.jpg"),
        (lambda folder: (folder / "class 0").rename(folder / "class 00"), "class 00"),
        (lambda folder: (folder / "a class").mkdir(), "class 0/00_v1"),
    ],
    ids=["added", "removed", "replaced", "touched", "renamed", "relabelled"],
)
def test_going_on_with_a_source_that_has_changed_ends_with_65_and_names_the_first_difference(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    words: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    begun(copy, tmp_path / "s")
    change(copy)
    assert write(copy, tmp_path / "s", *SHARD, "--resume") == 65
    error = capsys.readouterr().err
    assert "has changed" in error
    assert words in error


def test_a_finished_shard_that_was_lost_is_not_glossed_over(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = begun(source, tmp_path / "s")
    (part / "shards" / "000000.tar").write_bytes(b"")
    assert write(source, tmp_path / "s", *SHARD, "--resume") == 65
    assert "000000.tar was finished" in capsys.readouterr().err


def test_two_jobs_do_not_write_one_folder(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun(source, tmp_path / "s")
    with (tmp_path / "s.part" / "lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # held by this process, wanted by the child
        assert in_a_child(lambda: write(source, tmp_path / "s", *SHARD, "--resume")) == 73
    assert "another process is writing" in capfd.readouterr().err
