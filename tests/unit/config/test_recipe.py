"""Recipes: whatever doesn't fit in any stage is said at once, with its file and line, before anything runs."""

from pathlib import Path

import pytest

from swinv2_scale.config.recipe import Recipe, load_recipe
from swinv2_scale.errors import ConfigError
from tests.support.small_run import write_config

#: Overrides that make the small run's second stage out of its first.
SUPERVISED = "task.name=classification, model.num_classes=10"
STAGES = f"""
stages:
  - name: first
    config: small.yaml
  - name: second
    config: small.yaml
    overrides: [{SUPERVISED}]
  - name: third
    config: small.yaml
    overrides: [{SUPERVISED}, model.image_size=64, model.window_size=8]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small run's configuration."""
    write_config(tmp_path, tmp_path / "shards")
    return tmp_path


def loaded(folder: Path, text: str = STAGES, *overrides: str) -> Recipe:
    (folder / "x.yaml").write_text(text)
    return load_recipe(folder / "x.yaml", folder / "runs", overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    assert f"next: correct them, then: swinv2-scale recipe check {folder / 'x.yaml'}" in str(caught.value)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def changed(old: str, new: str, text: str = STAGES) -> str:
    assert old in text
    return text.replace(old, new)


def test_each_stage_starts_from_the_run_of_the_one_before(folder: Path) -> None:
    recipe = loaded(folder)
    runs = [folder / "runs" / name for name in ("01-first", "02-second", "03-third")]
    assert [stage.run_dir for stage in recipe.stages] == runs
    assert [stage.config.init_from for stage in recipe.stages] == [None, *map(str, runs[:2])]
    assert recipe.stages[2].words[-1] == f"init_from={runs[1]}"


def test_a_stage_can_start_from_an_earlier_one_or_from_what_its_configuration_says(folder: Path) -> None:
    text = changed("name: third", "name: third\n    starts_from: first")
    text = changed("name: second", "name: second\n    starts_from: null", text)
    text = changed(f"[{SUPERVISED}]", f"[{SUPERVISED}, init_from=weights.pth]", text)
    first, second, third = loaded(folder, text).stages
    assert (second.predecessor, second.config.init_from) == (None, "weights.pth")
    assert third.predecessor is first


def test_overrides_of_the_recipe_of_the_stage_and_of_the_command_line_come_in_this_order(folder: Path) -> None:
    text = changed(f"[{SUPERVISED}]", f"[{SUPERVISED}, seed=2]", f"overrides: [seed=1]\n{STAGES}")
    assert [stage.config.seed for stage in loaded(folder, text).stages] == [1, 2, 1]
    assert [stage.config.seed for stage in loaded(folder, text, "seed=3").stages] == [3, 3, 3]


def test_runs_are_below_a_folder_of_the_recipes_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(folder)
    monkeypatch.chdir(folder)
    assert load_recipe(Path("x.yaml")).stages[1].config.init_from == "runs/x/01-first"


def test_the_problems_of_all_stages_are_said_at_once(folder: Path) -> None:
    text = changed(f"[{SUPERVISED}]", f"[{SUPERVISED}, optim.lrr=1]")
    text = changed("model.window_size=8", "model.window_size=99", text)
    assert problems(folder, text) == [
        "x.yaml:7: stages.second: optim.lrr: no such key (did you mean optim.lr?)",
        "x.yaml:10: stages.third: model.window_size: 99 is larger than the first stage's whole map of 16 tokens (image "
        "64, patch 4); windows that fit: any up to 16, and [1, 2, 4, 8, 16] divide it evenly; or an image of 396 px or "
        "more",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.embed_dim=32", "model.embed_dim: is 32, the stage that it starts from has 16"),
        ("model.depths=[2,4]", "model.depths: is [2, 4], the stage that it starts from has [2, 2]"),
        ("model.num_heads=[1,4]", "model.num_heads: is [1, 4], the stage that it starts from has [2, 4]"),
        ("model.patch_size=2", "model.patch_size: is 2, the stage that it starts from has 4"),
        ("model.extra_norm_every=2", "model.extra_norm_every: is 2, the stage that it starts from has 0"),
        ("model.num_classes=9", "model.num_classes: is 9, that stage's head has 10; task.init_head_map picks rows"),
        ("model.pretrained_window_sizes=[8,8]", "is [8, 8], inherited from second are [4, 4]; leave it out"),
        ("task.init_head_map=m.txt", "task.init_head_map: the head map m.txt can't be read"),
        ("init_from=a.pth", "init_from: it starts from second already; starts_from: null leaves it to init_from"),
    ],
)
def test_weights_that_would_not_fit_are_found_before_the_first_stage_runs(
    folder: Path, override: str, said: str
) -> None:
    (found,) = problems(folder, changed("model.window_size=8", f'model.window_size=8, "{override}"'))
    assert found.startswith("x.yaml:10: stages.third: ")
    assert said in found


def test_channels_fit_if_they_are_the_same_or_come_from_rgb(folder: Path) -> None:
    rgb = 'model.in_channels=3, "data.pixel_mean=[0,0,0]", "data.pixel_std=[1,1,1]"'
    assert loaded(
        folder, changed("config: small.yaml\n  - name: s", f"config: small.yaml\n    overrides: [{rgb}]\n  - name: s")
    )
    (found,) = problems(folder, changed("model.window_size=8", f"model.window_size=8, {rgb}"))
    assert "model.in_channels: is 3, the stage that it starts from has 1; only RGB is adapted" in found


def test_a_head_of_other_classes_takes_a_map_or_is_begun_anew(folder: Path) -> None:
    other = changed("model.window_size=8", "model.window_size=8, model.num_classes=2, task.init_head: new")
    assert loaded(folder, changed("task.init_head: new", "task.init_head=new", other))
    (folder / "map.txt").write_text("3\n7\n")
    by_map = changed("task.init_head: new", f"task.init_head_map={folder / 'map.txt'}", other)
    assert loaded(folder, by_map)
    (folder / "map.txt").write_text("3\n10\n")
    assert "map.txt names class 10; the file's head has 0..9" in problems(folder, by_map)[0]
    (folder / "map.txt").write_text("3\n")
    assert "map.txt has 1 lines, the model has 2 classes" in problems(folder, by_map)[0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("task.init_head=keep", "there is no head to keep"),
        ("task.init_head_map=m.txt", "a map picks rows of a head, and that stage has none"),
    ],
)
def test_simmim_has_no_head_to_take(folder: Path, word: str, said: str) -> None:
    found = problems(folder, changed(f"[{SUPERVISED}]", f"[{SUPERVISED}, {word}]"))
    assert any(said in line and "stages.second" in line for line in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: []", "x.yaml:1: stages: []: tuple should have at least 1 item"),
        ("stage: []", "x.yaml:1: stage: no such key (did you mean stages?)"),
        ("stages:\n  - name: a\n    confg: a", "x.yaml:3: stages.0.confg: no such key (did you mean config?)"),
        ("stages:\n  - name: a", "x.yaml:2: stages.0.config: is required"),
        (
            "stages:\n  - {name: ../a, config: small.yaml}",
            "x.yaml:2: stages.0.name: ../a: holds other characters than letters",
        ),
        (
            "stages:\n  - {name: a, config: $(x)}",
            "x.yaml:2: stages.0.config: $(x): holds other characters than what no",
        ),
        ("overrides: [seed=1;x]\nstages: []", "x.yaml:1: overrides.0: seed=1;x: holds other characters than what no"),
        ("stages:\n  - {name: a, config: b.yaml}", "x.yaml:2: stages.a: config: b.yaml does not exist"),
        ("stages:\n  - {name: a, config: .}", "x.yaml:2: stages.a: config: . is no plain file"),
        (changed("third", "first"), "x.yaml:8: stages.first: name: another stage has this name"),
        (
            changed("name: third", "name: third\n    starts_from: secnd"),
            "x.yaml:8: stages.third: starts_from: 'secnd' is no stage before this one; there are first, second "
            "(did you mean second?)",
        ),
        (
            changed("name: first", "name: first\n    starts_from: third"),
            "x.yaml:3: stages.first: starts_from: 'third' is no stage before this one; there are none",
        ),
    ],
)
def test_what_is_wrong_with_the_file_itself_is_said_with_its_line(folder: Path, text: str, said: str) -> None:
    assert any(line.replace(str(folder), ".").startswith(said) for line in problems(folder, text))


def test_a_stages_file_that_is_no_configuration_is_a_problem_of_the_recipe(folder: Path) -> None:
    (folder / "bad.yaml").write_text("[1]")
    (found,) = problems(folder, "stages:\n  - {name: a, config: bad.yaml}")
    assert found == "x.yaml:2: stages.a: bad.yaml: a configuration is a mapping of keys, this file holds tuple"
