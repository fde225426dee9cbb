"""The task's section: which class it is, whose keys count, and what a wrong one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from timm.data.auto_augment import rand_augment_transform

from swinv2_scale.config.loader import LoadedConfig, load_config, to_yaml
from swinv2_scale.config.tasks import ClassificationConfig, RandAugment, SimMIMConfig
from swinv2_scale.errors import ConfigError, ConfigProblem

REST = """\
model: {variant: tiny, num_classes: 10}
data: {train: a.tar, validation: b.tar, global_batch_size: 8, micro_batch_size: 4}
optim: {lr: 1e-3, total_steps: 10}
"""
SIMMIM = "task: {name: simmim, mask_ratio: 0.5}\n"
CLASSIFICATION = "task: {name: classification, smoothing: 0.2}\n"


def loaded(folder: Path, task: str, *overrides: str) -> LoadedConfig:
    path = folder / "run.yaml"
    path.write_text(REST + task)
    return load_config(path, list(overrides))


def problems(folder: Path, task: str, *overrides: str) -> list[ConfigProblem]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, task, *overrides)
    return list(caught.value.problems)


# Which task


def test_the_name_chooses_the_section(tmp_path: Path) -> None:
    assert loaded(tmp_path, SIMMIM).config.task == SimMIMConfig(mask_ratio=0.5)
    assert loaded(tmp_path, CLASSIFICATION).config.task == ClassificationConfig(name="classification", smoothing=0.2)


def test_a_section_without_a_name_is_simmims(tmp_path: Path) -> None:
    assert loaded(tmp_path, "task: {mask_ratio: 0.5}\n").config.task == SimMIMConfig(mask_ratio=0.5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("classificaton", "classification"), ("simim", "simmim"), ("xyzzy", ""), ("null", ""), ("3", ""), ("{}", "")],
)
def test_an_unknown_name_is_told_the_known_ones(tmp_path: Path, name: str, meant: str) -> None:
    (problem,) = problems(tmp_path, f"task:\n  smoothing: 0.1\n  name: {name}\n")
    assert problem.key == "task.name"
    assert problem.message == f"{name} is none of simmim, classification"
    assert problem.suggestion == meant
    assert problem.where == f"{tmp_path}/run.yaml:6"


def test_an_unknown_name_does_not_hide_mistakes_elsewhere(tmp_path: Path) -> None:
    found = problems(tmp_path, "task: {name: [{a: 1}]}\n", "optim.lrr=1", "optim.total_steps=0")
    assert {problem.key for problem in found} == {"task.name", "optim.lrr", "optim.total_steps"}


@pytest.mark.parametrize("value", ["classification", "3", "[]", "null"])
def test_a_task_that_is_no_section_is_pointed_to_its_name(tmp_path: Path, value: str) -> None:
    (problem,) = problems(tmp_path, SIMMIM, f"task={value}")
    assert (problem.key, problem.suggestion) == ("task", "task.name")
    assert problem.message == f"{value} is no section; the name in one is simmim or classification"
    assert problem.where == f"command line 'task={value}'"


# Whose keys


@pytest.mark.parametrize(
    ("task", "word", "owner"),
    [
        (SIMMIM, "task.smoothing=0.1", "classification"),
        (CLASSIFICATION, "task.mask_ratio=0.5", "simmim"),
        ("task: {}\n", "task.mixup=0.8", "classification"),
    ],
)
def test_a_key_of_another_task_is_told_whose_it_is(tmp_path: Path, task: str, word: str, owner: str) -> None:
    (problem,) = problems(tmp_path, task, word)
    other = {"simmim": "classification", "classification": "simmim"}[owner]
    assert problem.key == word.partition("=")[0]
    assert problem.message == f"is a key of {owner}, task.name is {other}"
    assert problem.suggestion == ""
    assert problem.where == f"command line {word!r}"


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [("task.smothing=0.1", "task.smoothing"), ("optim.mixup=0.8", "task.mixup"), ("task.lr=1", "optim.lr")],
)
def test_a_key_of_no_task_is_told_the_nearest_of_this_one(tmp_path: Path, word: str, suggestion: str) -> None:
    (problem,) = problems(tmp_path, CLASSIFICATION, word)
    assert (problem.key, problem.message) == (word.partition("=")[0], "no such key")
    assert problem.suggestion == suggestion


def test_the_nearest_key_is_none_of_another_tasks(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, SIMMIM, "optim.cutmix=1.0")
    assert problem.suggestion == ""


def test_a_value_of_the_wrong_type_is_reported_by_the_key_alone(tmp_path: Path) -> None:
    found = problems(tmp_path, CLASSIFICATION, "task.smoothing=high", "task.remode=noise", "task.crop_scale=[0.1]")
    assert {problem.key for problem in found} == {"task.smoothing", "task.remode", "task.crop_scale"}


# Another task over a base


def extending(folder: Path, base: str, task: str, *overrides: str) -> LoadedConfig:
    (folder / "base.yaml").write_text(REST + base)
    (folder / "run.yaml").write_text("extends: base.yaml\n" + task)
    return load_config(folder / "run.yaml", list(overrides))


def test_another_task_begins_a_new_section(tmp_path: Path) -> None:
    task = extending(tmp_path, SIMMIM, "task: {name: classification, mixup: 0.8}\n").config.task
    assert task == ClassificationConfig(name="classification", mixup=0.8)


def test_so_it_does_over_a_base_that_names_none(tmp_path: Path) -> None:
    task = extending(tmp_path, "task: {mask_ratio: 0.5}\n", CLASSIFICATION).config.task
    assert task == ClassificationConfig(name="classification", smoothing=0.2)


@pytest.mark.parametrize("name", ["", "name: classification, "])
def test_the_same_task_adds_to_the_bases_section(tmp_path: Path, name: str) -> None:
    task = extending(tmp_path, CLASSIFICATION, f"task: {{{name}mixup: 0.8}}\n").config.task
    assert task == ClassificationConfig(name="classification", smoothing=0.2, mixup=0.8)


def test_a_file_that_names_no_task_may_not_use_anothers_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a key of simmim, task\.name is classification"):
        extending(tmp_path, CLASSIFICATION, "task: {mask_ratio: 0.5}\n")


@pytest.mark.parametrize(
    "words",
    [
        ("task.name=classification", "task.mixup=0.8"),
        ("task.mixup=0.8", "task.name=classification"),
        ("task={mixup: 0.8, name: classification}",),
        ("task={mixup: 0.8}", "seed=1", "task={name: classification}"),
        ("task.mixup=0.8", "task.name=simmim", "task.name=classification"),
    ],
    ids=str,
)
def test_the_command_line_may_name_another_task_wherever(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert loaded(tmp_path, SIMMIM, *words).config.task == ClassificationConfig(name="classification", mixup=0.8)


def test_a_name_that_is_the_files_forgets_nothing(tmp_path: Path) -> None:
    assert loaded(tmp_path, SIMMIM, "task.name=simmim").config.task == SimMIMConfig(mask_ratio=0.5)
    words = ("task.name=simmim", "task.name=classification")
    assert loaded(tmp_path, CLASSIFICATION, *words).config.task == loaded(tmp_path, CLASSIFICATION).config.task


def test_the_command_lines_keys_are_of_the_task_that_it_names(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, SIMMIM, "task.mask_ratio=0.6", "task.name=classification")
    assert problem.message == "is a key of simmim, task.name is classification"


def test_a_classification_reads_back_from_its_resolved_yaml(tmp_path: Path) -> None:
    words = (
        *("task.aa=rand-m9-mstd0.5-inc1", "task.reprob=0.25", "task.recount=2", "task.mixup=0.8", "task.cutmix=1.0"),
        *("task.crop_scale=[0.2, 0.9]", "task.crop_mode=squash", 'task.class_names="007"', "task.init_head=new"),
        *("optim.schedule=multistep", "optim.milestones=[4, 8]", "optim.layer_decay=0.87", "evaluation.patience=3"),
        *("evaluation.metric=top1",),
    )
    first = loaded(tmp_path, CLASSIFICATION, *words)
    text = to_yaml(first)
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_config(tmp_path / "resolved.yaml").config == first.config
    assert f"  smoothing: 0.2  # {tmp_path}/run.yaml:4\n" in text
    assert "  aa: rand-m9-mstd0.5-inc1  # command line" in text
    assert "  flip_probability: 0.5  # default\n" in text
    assert "mask_ratio" not in text


def test_what_another_task_said_is_no_origin_of_a_value(tmp_path: Path) -> None:
    text = to_yaml(loaded(tmp_path, "task: {flip_probability: 0.1}\n", "task.name=classification"))
    assert "  flip_probability: 0.5  # default\n" in text


# RandAugment's names


@pytest.mark.parametrize(
    "name",
    [
        *("rand-m9-mstd0.5-inc1", "rand-inc1", "rand-m9-inc1", "rand-n3-m7-mstd1-inc1", "rand-mstd0.5-inc1"),
        *("rand-inc1-m0", "rand-m10-n16-inc1", "rand-mstd10-inc1"),
    ],
)
def test_a_name_means_what_it_means_to_timm(name: str) -> None:
    theirs = rand_augment_transform(name, {"img_mean": (0, 0, 0)})
    ours = RandAugment.of(name)
    assert ours.num_ops == theirs.num_layers
    for op in theirs.ops:
        assert (ours.magnitude, ours.magnitude_std) == (op.magnitude, op.magnitude_std)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "rand-m9-mstd0.5-inc1"),
        ("rand", "inc1"),
        ("rand-m9-mstd0.5", "inc1"),
        ("rand-m9-inc0", "inc1"),
        ("augmix-m3-inc1", "rand-m9-mstd0.5-inc1"),
        ("original", "rand-m9-mstd0.5-inc1"),
        ("rand-w0-inc1", "'w0' is none of"),
        ("rand-m9-p0.5-inc1", "'p0.5' is none of"),
        ("rand-m-inc1", "'m' is none of"),
        ("rand-m-9-inc1", "'m' is none of"),
        ("rand--inc1", "'' is none of"),
        ("rand-m9-inc1 ", "'inc1 ' is none of"),
        ("rand-M9-inc1", "'M9' is none of"),
        ("rand-m10.5-inc1", "0 to 10"),
        ("rand-n0-inc1", "1 to 16"),
        ("rand-n17-inc1", "1 to 16"),
        ("rand-n2.5-inc1", "1 to 16"),
        ("rand-mstd101-inc1", "at most 10"),
    ],
)
def test_a_name_that_is_not_understood_is_refused_with_one_that_is(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        RandAugment.of(name)
    (problem,) = problems(tmp_path, CLASSIFICATION, f"task.aa='{name}'")
    assert problem.key == "task.aa"
    assert problem.message == f"{name!r}: {caught.value}"


@pytest.mark.parametrize(
    ("values", "is_mixed"),
    [
        ({}, False),
        ({"mixup": 0.8}, True),
        ({"cutmix": 1.0}, True),
        ({"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.0}, False),
    ],
)
def test_images_are_mixed_where_an_alpha_and_the_probability_are_above_0(values: dict, is_mixed: bool) -> None:
    assert ClassificationConfig(name="classification", **values).is_mixed == is_mixed
