"""``swinv2-scale status``: what it makes of a run directory, whatever is in it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.cli.main import main
from swinv2_scale.engine.checkpoint import FileRecord, manifest_text, name_of
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.status import FRUITLESS_LIVES, read_status
from tests.support.deadline import within
from tests.support.small_run import write_config

TOTAL = 30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun: a configuration of 30 steps, and nothing else."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_config(tmp_path, tmp_path).rename(tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def save(run: Path, step: int, state: dict[str, Any] | None = None) -> None:
    path = run / "checkpoints" / name_of(step)
    path.mkdir()
    records = []
    if state is not None:
        (path / "state.json").write_text(json.dumps(state))
        records = [FileRecord("state.json", 1, "whether it is whole isn't asked")]
    (path / "manifest.json").write_text(manifest_text(step, 2, records))


def give_patience(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("evaluation:\n", "evaluation:\n  patience: 2\n"))


def train(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "loss": 1 / step, "images_per_second": 100.0 + step, "step_seconds": 60.0}
            file.write(json.dumps(row) + "\n")


def live(run: Path, name: str, from_step: int = 0, **end: Any) -> None:
    """Lines of a life, and of its end if anything is known of it."""
    lines: list[dict[str, Any]] = [{"started": "2026-11-23T06:00:00+0000", "life": name, "from_step": from_step}]
    if end:
        lines.append({"ended": "2026-11-23T07:00:00+0000", "life": name, "step": 5, **end})
    with (run / "lives.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def judged(run: Path) -> tuple[str, int]:
    status = read_status(run)
    return status.state, int(status.exit_code)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, ("killed", 85)),
        ({"exit_code": 85}, ("stopped", 85)),
        ({"exit_code": 75, "why": "rank 1 is gone"}, ("failed", 85)),
        ({"exit_code": 0}, ("finished", 0)),  # --steps was reached
        ({"exit_code": 65}, ("failed", 65)),
        ({"exit_code": 70}, ("failed", 70)),
        ({"exit_code": 73}, ("failed", 73)),
        ({"exit_code": 78}, ("failed", 78)),
        ({"exit_code": 1}, ("failed", 1)),
    ],
    ids=str,
)
def test_the_last_life_says_whether_to_start_again(run: Path, end: dict[str, Any], expected: tuple[str, int]) -> None:
    live(run, "a", exit_code=78)
    live(run, "b", **end)
    assert judged(run) == expected


def test_a_run_is_finished_when_its_last_step_is_saved_however_its_life_ended(run: Path) -> None:
    live(run, "a")
    save(run, TOTAL)
    assert judged(run) == ("finished", 0)


@pytest.mark.parametrize(("since_best", "expected"), [(2, "finished"), (1, "killed"), ("2", "killed")])
def test_a_run_whose_patience_is_used_up_is_finished(run: Path, since_best: object, expected: str) -> None:
    give_patience(run)
    live(run, "a")
    save(run, 10, {"config": {}, "validations_since_best": since_best})
    assert judged(run)[0] == expected


def test_a_state_that_is_a_pipe_is_not_waited_for(run: Path) -> None:
    give_patience(run)
    live(run, "a")
    save(run, 10, {"config": {}})
    state = run / "checkpoints" / name_of(10) / "state.json"
    state.unlink()
    os.mkfifo(state)
    with within(10):
        assert judged(run)[0] == "killed"


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    assert judged(tmp_path) == ("not begun", 85)


def test_a_misspelled_run_ends_with_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "rnu")]) == 78
    assert "rnu does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("end", [{}, {"exit_code": 75}], ids=["killed", "peer lost"])
def test_lives_that_get_nowhere_are_not_started_again_for_ever(run: Path, end: dict[str, Any]) -> None:
    save(run, 7)
    for number in range(FRUITLESS_LIVES):
        assert judged(run)[1] == 85
        live(run, f"life-{number}", from_step=7, **end)
    assert judged(run) == ("failed", 75)
    assert "3 lives in a row got no further than step 7" in read_status(run).reason
    save(run, 14)
    assert judged(run)[1] == 85


def test_attempts_that_never_became_lives_count_among_those_that_get_nowhere(run: Path) -> None:
    live(run, "a")
    for _ in range(FRUITLESS_LIVES):
        with (run / "lives.jsonl").open("a") as file:
            file.write('{"ended": "2026-11-23T07:00:00+0000", "life": "", "exit_code": 75}\n')
    assert judged(run) == ("failed", 75)


def test_lives_that_are_stopped_before_they_can_train_get_nowhere_either(run: Path) -> None:
    """A time limit that is shorter than cluster.grace_s, say."""
    for number in range(FRUITLESS_LIVES):
        assert judged(run)[1] == 85
        live(run, f"life-{number}", exit_code=85)
    assert judged(run) == ("failed", 75)


#: Takes a run's lock as a job does, and keeps it until it is told to end.
HOLDER = """
import sys
from pathlib import Path
from swinv2_scale.engine.run_dir import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_looking_at_a_running_job_neither_writes_nor_keeps_it_from_its_lock(run: Path) -> None:
    live(run, "a")
    train(run, 1, 2)
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "locked\n"
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
        assert judged(run) == ("running", 73)
        assert f"pid {job.pid} on {socket.gethostname()}, since" in read_status(run).reason
        assert [life["reason"] for life in read_status(run).to_json()["lives"]] == ["running"]
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before
        job.communicate("", timeout=30)
    assert judged(run) == ("killed", 85)


def test_without_locks_between_hosts_the_age_of_its_files_says_that_a_job_runs(run: Path) -> None:
    live(run, "a")
    train(run, 1)
    (run / ".lock").write_text("pid 4711 on another-host, since 2026-11-23 06:00:00\n")
    assert judged(run) == ("running", 73)
    long_ago = time.time() - 1801  # cluster.timeout_s, after which its watchdog would have ended it
    for path in (run / "metrics.jsonl", run / "lives.jsonl"):
        os.utime(path, (long_ago, long_ago))
    assert judged(run) == ("killed", 85)


def test_rates_are_medians_of_the_last_steps_and_the_time_left_follows(run: Path) -> None:
    live(run, "a", exit_code=85)
    train(run, 1, 2, 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": null, "images_per_second": 1e308, "step_seconds": NaN}\n{"step": 5, "lo')
    status = read_status(run)
    assert (status.step, status.loss, status.images_per_second) == (4, None, 102.0)
    assert status.seconds_left == 60.0 * (TOTAL - 4)


def test_a_table_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(run, "a", exit_code=85, why="SIGUSR1")
    train(run, 1, 2, 3)
    save(run, 3)
    (run / "quarantine.jsonl").write_text('{"step": 2}\n')
    assert main(["status", str(run)]) == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert lines["state"] == "state stopped: asked to stop: SIGUSR1"
    assert lines["step"] == "step 3 of 30 (10%)"
    assert lines["rate"] == "rate 102 images/s"
    assert lines["time"] == "time left 27.0 min, once it runs again"
    assert lines["checkpoint"].startswith("checkpoint step 3, 0 s ago")
    assert lines["quarantined"] == "quarantined 1"
    assert lines["life"].startswith("life 1 2026-11-23 06:00:00 step 0 to 5; 2026-11-23 07:00:00 asked to stop")


def test_the_stages_of_a_recipe_are_rows_and_the_first_that_is_not_finished_is_the_exit_code(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live(run, "a", exit_code=0)
    (tmp_path / "next").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["status", str(run), str(tmp_path / "next"), "--exit-code"])
    assert end.value.code == 85
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["run", "finished"], ["next", "not"]]


def test_json_for_scripts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(run, "a", exit_code=75, why="rank 1 is gone")
    save(run, 7)
    assert main(["status", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["exit_code"], found["step"], found["total_steps"]) == ("failed", 85, 7, TOTAL)
    assert found["checkpoint"]["step"] == 7
    assert found["lives"][0]["reason"] == "exit code 75: rank 1 is gone"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "name", ["lives.jsonl", "metrics.jsonl", "config.yaml", ".lock", "checkpoints", "anomalies.jsonl"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "noise", "deep", "types", "huge numbers"])
def test_f13_whatever_lies_in_its_place_is_taken_as_it_is(run: Path, name: str, kind: str) -> None:
    path = run / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "noise":
        path.write_bytes(os.urandom(4096))
    elif kind == "deep":
        path.write_text(DEEP)
    elif kind == "types":
        path.write_text('{"life": [], "step": "x", "exit_code": true, "loss": {}, "command": [1], "why": 5}\n5\n"x"\n')
    else:
        number = "9" * 4000
        path.write_text(f'{{"life": "a", "step": {number}, "exit_code": {number}, "loss": {number}}}\n')
    with within(20):
        read_status(run).to_json()
        assert main(["status", str(run)]) == 0


def test_f13_an_exit_code_that_no_process_can_have_is_none(run: Path) -> None:
    """256 would be 0 to the shell: finished."""
    live(run, "a", exit_code=256)
    assert judged(run) == ("killed", 85)


# The lines themselves


def test_a_life_is_two_lines_and_a_line_that_was_cut_spoils_no_other(run: Path) -> None:
    directory = RunDirectory(run)
    directory.open()
    directory.record_life(from_step=0)
    with directory.lives.open("a") as file:
        file.write('{"started": "2026')  # the power went
    directory.step = 4
    directory.record_end(70, "the loss\nis not finite")
    directory.close()
    (life,) = read_status(run).lives
    assert (life.exit_code, life.step, life.why, life.from_step) == (70, 4, "the loss", 0)


def test_an_attempt_is_recorded_only_where_a_run_has_begun(tmp_path: Path, run: Path) -> None:
    RunDirectory(tmp_path / "new").record_end(78, "a wrong world size")
    assert not (tmp_path / "new").exists()
    live(run, "a", exit_code=85)
    RunDirectory(run).record_end(78, "a wrong world size")
    assert judged(run) == ("failed", 78)


def test_who_is_refused_a_run_writes_nothing_into_it(run: Path) -> None:
    live(run, "a")
    before = (run / "lives.jsonl").read_text()
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        job.stdout.readline()
        RunDirectory(run).record_end(73, "in use")
        job.communicate("", timeout=30)
    assert (run / "lives.jsonl").read_text() == before


def test_an_end_that_cannot_be_written_is_no_error(run: Path) -> None:
    directory = RunDirectory(run)
    directory.open()
    directory.lives.mkdir()
    directory.record_end(0)
    directory.close()
