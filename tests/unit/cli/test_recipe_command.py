"""``swinv2-scale recipe``: what it makes of run directories, and what it refuses before anything runs."""

import hashlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.cli.main import main
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.recipe import Recipe, load_recipe
from swinv2_scale.engine.chain import check_start, stage_status
from swinv2_scale.engine.checkpoint import FileRecord, manifest_text, name_of
from swinv2_scale.engine.preemption import STOP_SIGNALS
from swinv2_scale.engine.resume import plain
from swinv2_scale.errors import CheckpointError
from tests.support.small_run import write_config

TOTAL = 30
STAGES = ("first", "second", "third")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """Three stages of thirty steps, none of them started."""
    write_config(tmp_path, tmp_path / "shards")
    stages = "".join(f"  - {{name: {name}, config: small.yaml}}\n" for name in STAGES)
    (tmp_path / "x.yaml").write_text(f"stages:\n{stages}")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield load_recipe(Path("x.yaml"))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def trained(recipe: Recipe, number: int, step: int, *overrides: str, **state: Any) -> Path:
    """The run directory of a stage that has saved a step, without any weights; its checkpoint."""
    stage = recipe.stages[number - 1]
    path = stage.run_dir / "checkpoints" / name_of(step)
    path.mkdir(parents=True)
    config = load_config(stage.config_path, [*stage.words, *overrides]).config
    data = json.dumps({**state, "config": plain(config)}).encode()
    (path / "state.json").write_bytes(data)
    records = [FileRecord("state.json", len(data), hashlib.sha256(data).hexdigest())]
    (path / "manifest.json").write_text(manifest_text(step, 1, records))
    (stage.run_dir / "config.yaml").write_text(stage.config_path.read_text())
    rows = [{"step": step, "loss": 0.5, "validation_loss": 0.25, "validation_top1": 0.875}]
    (stage.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lives = [{"started": "2026-11-23T06:00:00+0000", "life": "a", "from_step": 0}]
    lives.append({"ended": "2026-11-23T07:00:00+0000", "life": "a", "exit_code": 0 if step == TOTAL else 85})
    (stage.run_dir / "lives.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lives))
    return path


def refusal(recipe: Recipe, number: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_start(recipe.stages[number - 1], "to finish it", "to repair it")
    assert caught.value.exit_code == 65
    return str(caught.value)


def answered(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    try:
        ended = main(["recipe", *map(str, words)])
    except SystemExit as end:
        ended = int(end.code or 0)
    said = capsys.readouterr()
    assert ended == code, said.err
    return said.err if code else said.out


def test_status_shows_each_stage_from_not_started_to_finished(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(recipe, 1, TOTAL)
    trained(recipe, 2, 7)
    lines = answered(capsys, "status", "x.yaml").splitlines()[-3:]
    assert [re.split(r"  +| (?=not|fin|stop)", line.strip())[2] for line in lines] == [
        "finished",
        "stopped",
        "not started",
    ]
    assert "30 of 30" in lines[0]
    assert "loss 0.2500, top1 87.5%" in lines[0]
    assert "7 of 30" in lines[1]
    rows = json.loads(answered(capsys, "status", "x.yaml", "--json"))
    assert [(row["stage"], row["state"], row["step"]) for row in rows] == [
        ("first", "finished", 30),
        ("second", "stopped", 7),
        ("third", "not started", 0),
    ]
    assert rows[1]["starts_from"] == "first"
    assert rows[0]["run"]["validation"] == {"loss": 0.25, "top1": 0.875}


def test_a_run_that_was_begun_for_fewer_steps_than_the_recipe_has_is_not_finished(recipe: Recipe) -> None:
    trained(recipe, 1, TOTAL)
    assert stage_status(recipe.stages[0]).state == "finished"
    longer = load_recipe(recipe.path, overrides=("optim.total_steps=40",))
    assert stage_status(longer.stages[0]).state == "stopped"


def test_a_stage_that_stopped_early_is_finished(recipe: Recipe) -> None:
    patient = load_recipe(recipe.path, overrides=("evaluation.patience=2",))
    checkpoint = trained(patient, 1, 20, validations_since_best=2)
    assert stage_status(patient.stages[0]).state == "finished"
    check_start(patient.stages[1], "", "")
    checkpoint.rename(checkpoint.with_name("gone"))
    trained_again = trained(patient, 2, 20, validations_since_best=1)
    assert trained_again.exists()
    assert stage_status(patient.stages[1]).state == "stopped"


def test_a_stage_can_begin_when_its_predecessor_is_finished(recipe: Recipe) -> None:
    trained(recipe, 1, TOTAL)
    check_start(recipe.stages[0], "", "")
    check_start(recipe.stages[1], "", "")


def test_a_missing_predecessor_is_named_with_the_command_that_finishes_it(recipe: Recipe) -> None:
    assert refusal(recipe, 2) == (
        "stage second starts from first, which has not been started: there is no runs/x/01-first\n"
        "  next: this finishes it: to finish it"
    )


def test_an_unfinished_predecessor_is_named_with_the_step_it_is_at(recipe: Recipe) -> None:
    trained(recipe, 1, 7)
    assert "stage second starts from first, whose run runs/x/01-first is stopped at step 7 of 30" in refusal(recipe, 2)


def test_a_damaged_predecessor_is_found(recipe: Recipe) -> None:
    checkpoint = trained(recipe, 1, TOTAL)
    (checkpoint / "state.json").write_text("{}")
    said = refusal(recipe, 2)
    assert "stage second starts from first: " in said
    assert "restore it from a copy, or: to repair it" in said
    trained(recipe, 1, 7)
    said = refusal(recipe, 2)
    assert "whose last checkpoint is damaged; the newest whole one is runs/x/01-first/checkpoints" in said
    assert "this trains from there to the end again: to repair it" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.depths=[2,4]", "depths [2, 4], the recipe has [2, 2]"),
        ("model.embed_dim=32", "embed_dim 32, the recipe has 16"),
        ("model.num_classes=5", "num_classes 5, the recipe has 0"),
    ],
)
def test_a_predecessor_of_another_model_is_found(recipe: Recipe, override: str, said: str) -> None:
    trained(recipe, 1, TOTAL, override)
    assert said in refusal(recipe, 2)


def test_a_stage_that_has_begun_needs_no_predecessor_any_more(recipe: Recipe) -> None:
    trained(recipe, 2, 7)
    check_start(recipe.stages[1], "", "")


def test_run_refuses_a_stage_whose_predecessor_is_not_there_and_says_what_to_type(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answered(capsys, "run", "x.yaml", "--stages", "second..", "--launcher", "python", code=65)
    assert "this finishes it: swinv2-scale recipe run x.yaml --dir runs/x --stages ..first --launcher python" in said
    assert not Path("runs").exists()


def test_run_has_nothing_to_do_where_all_is_finished(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        trained(recipe, number, TOTAL)
    assert answered(capsys, "run", "x.yaml").splitlines() == [
        *(f"stage {number} of 3, {name}: finished" for number, name in enumerate(STAGES, 1)),
        "done: runs/x/03-third holds the weights of third",
    ]


def test_a_launcher_that_is_not_there_is_a_typed_error(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot start no-such-program" in answered(
        capsys, "run", "x.yaml", "--launcher", "no-such-program --num_gpus 2", code=78
    )


def test_a_stage_that_fails_before_there_is_a_job_stops_the_recipe_with_its_code_and_name(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answered(capsys, "run", "x.yaml", "--launcher", "false", code=1)
    assert "stage 1 of 3, first: ended with 1" in said


def test_check_lists_the_stages_and_where_each_starts(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    lines = answered(capsys, "check", "x.yaml").splitlines()
    assert lines[0] == "x.yaml: 3 stages that fit together, in runs/x"
    assert lines[1] == "  1 first: simmim, tiny, 32/4, 30 steps, from drawn weights"
    assert lines[2].endswith("from first")


def jobs(text: str) -> list[str]:
    return re.findall(r"--job-name=(\S+)", text)


SIZE = ("--nodes", 1, "--gpus-per-node", 1, "--print")


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("..", ["01-first", "02-second", "03-third"]),
        ("1", ["01-first"]),
        ("first", ["01-first"]),
        ("..second", ["01-first", "02-second"]),
        ("1..2", ["01-first", "02-second"]),
    ],
)
def test_stages_are_chosen_by_name_or_number(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], stages: str, expected: list[str]
) -> None:
    assert jobs(answered(capsys, "submit", "x.yaml", *SIZE, "--stages", stages)) == expected


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("secnd", "x.yaml has no stage 'secnd'"),
        ("4", "it has 1 first, 2 second, 3 third"),
        ("3..2", "stage 2 is before 3"),
    ],
)
def test_stages_that_are_not_there_are_refused(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], stages: str, said: str
) -> None:
    assert said in answered(capsys, "submit", "x.yaml", *SIZE, "--stages", stages, code=78)


def test_what_is_submitted_starts_from_the_run_before_and_what_is_finished_is_left_out(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained(recipe, 1, TOTAL)
    text = answered(capsys, "submit", "x.yaml", *SIZE)
    assert jobs(text) == ["02-second", "03-third"]
    starts = re.findall(r"init_from=(\S+)", text)
    assert starts == [f"{tmp_path}/runs/x/{name}" for name in ("01-first", "02-second")]
    assert text.count("script=$repository/launch/finetune.py") == 2


def test_a_stage_that_does_not_fit_the_allocation_is_found_before_the_first_is_queued(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answered(capsys, "submit", "x.yaml", "--nodes", 3, "--gpus-per-node", 1, code=78)
    assert "is not a multiple of data.micro_batch_size 4 x 3 processes" in said
    assert not Path("runs").exists()
