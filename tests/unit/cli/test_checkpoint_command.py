"""``swinv2-scale checkpoint``: what people see of a run's checkpoints, and what stays when they prune."""

import hashlib
import json
from pathlib import Path

import pytest

from swinv2_scale.cli.main import main
from swinv2_scale.engine.checkpoint import FileRecord, manifest_text, name_of
from swinv2_scale.engine.run_dir import RunDirectory

#: Validation losses by step; None: there was no validation.
LOSSES = {5: 0.9, 10: 0.5, 15: 0.7, 20: None, 25: 0.6, 30: 0.8}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six checkpoints, of anything but weights."""
    config = {"engine.zero_stage": 3, "engine.precision": "bf16", "checkpoint.keep": 2}
    for step, loss in LOSSES.items():
        path = tmp_path / "run" / "checkpoints" / name_of(step)
        path.mkdir(parents=True)
        records = []
        for name, data in (
            ("a.pt", f"weights {step}".encode()),
            ("state.json", json.dumps({"config": config}).encode()),
        ):
            (path / name).write_bytes(data)
            records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
        (path / "manifest.json").write_text(manifest_text(step, 4, records, loss, score=loss))
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def damage(run: Path, step: int) -> None:
    (run / "checkpoints" / name_of(step) / "a.pt").write_bytes(f"Weights {step}".encode())


def test_list_shows_every_checkpoint_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["validation_loss"]) for row in rows] == sorted(LOSSES.items(), reverse=True)
    assert {(row["processes"], row["zero_stage"], row["precision"]) for row in rows} == {(4, 3, "bf16")}
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "30"
    assert lines[2].split()[-1] == "0.8000"
    assert max(map(len, lines)) <= 80


def test_verify_names_what_is_damaged_and_ends_with_65(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole, 2 files") == 6
    damage(run, 15)
    assert main(["checkpoint", "verify", str(run)]) == 65
    shown = capsys.readouterr()
    assert shown.out.count("whole, 2 files") == 5
    assert "step 15: DAMAGED" in shown.out
    assert f"{name_of(15)}/a.pt has SHA-256" in shown.out
    assert "1 of 6 checkpoints" in shown.err
    assert main(["checkpoint", "verify", str(run / "checkpoints" / name_of(10))]) == 0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], [25, 30]),
        (["--keep", "3"], [20, 25, 30]),
        (["--keep-every-steps", "10"], [10, 20, 25, 30]),
        (["--keep-best", "1"], [10, 25, 30]),
        (["--keep-best", "2", "--keep-every-steps", "15"], [10, 15, 25, 30]),
    ],
)
def test_prune_keeps_what_the_run_or_the_options_ask_for(run: Path, options: list[str], kept: list[int]) -> None:
    assert main(["checkpoint", "prune", str(run), "--dry-run", *options]) == 0
    assert steps(run) == sorted(LOSSES)
    assert main(["checkpoint", "prune", str(run), *options]) == 0
    assert steps(run) == kept


def test_f25_damaged_checkpoints_don_t_count_among_those_that_stay(run: Path) -> None:
    damage(run, 30)
    damage(run, 20)
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert steps(run) == [15, 20, 25, 30]  # 25 and 15 are whole; nothing older goes before the second one is found


@pytest.mark.parametrize("option", ["--keep", "--keep-every-steps", "--keep-best"])
def test_prune_refuses_to_keep_too_few(run: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "prune", str(run), option, "0"])
    assert ended.value.code == 78
    with pytest.raises(SystemExit):
        main(["checkpoint", "prune", str(run), "--keep", "1"])
    assert "two at least stay" in capsys.readouterr().err
    assert steps(run) == sorted(LOSSES)


def test_prune_leaves_a_run_that_is_in_use_alone(run: Path) -> None:
    import os

    # The lock is this process's own; another process has to find it taken.
    directory = RunDirectory(run)
    directory.lock()
    pid = os.fork()
    if pid == 0:
        os._exit(main(["checkpoint", "prune", str(run)]))
    _, status = os.waitpid(pid, 0)
    directory.close()
    assert os.waitstatus_to_exitcode(status) == 73
    assert steps(run) == sorted(LOSSES)


def test_a_folder_without_checkpoints_says_what_to_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "verify", "prune"):
        assert main(["checkpoint", action, str(tmp_path / "nothing")]) == 65
        assert "name a run directory" in capsys.readouterr().err
