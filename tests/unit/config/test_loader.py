"""From YAML files and command-line words to one RunConfig, or to every problem at once."""

import json
from pathlib import Path

import pytest
import yaml

from swinv2_scale.config.loader import LoadedConfig, flatten, load_config, to_yaml
from swinv2_scale.config.run import RunConfig
from swinv2_scale.errors import ConfigError, ExitCode

SMALLEST = """\
model:
  variant: tiny
data:
  train: shards/a.tar
  global_batch_size: 8
  micro_batch_size: 4
task:
  name: simmim
optim:
  lr: 1e-3
  total_steps: 10
"""


def written(folder: Path, text: str = SMALLEST, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str = SMALLEST, *overrides: str) -> LoadedConfig:
    return load_config(written(folder, text), list(overrides))


def refusal(folder: Path, text: str = SMALLEST, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    return caught.value


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


# Misspelled, missing and mistyped


@pytest.mark.parametrize(
    ("wrong", "instead_of", "suggestion"),
    [
        ("lrr: 1e-3", "lr: 1e-3", "optim.lr"),
        ("totl_steps: 10", "total_steps: 10", "optim.total_steps"),
        ("varient: tiny", "variant: tiny", "model.variant"),
        ("micro_batchsize: 4", "micro_batch_size: 4", "data.micro_batch_size"),
        ("optimizer:", "optim:", "optim"),
    ],
)
def test_a_misspelled_key_is_named_with_its_file_its_line_and_the_nearest_key(tmp_path, wrong, instead_of, suggestion):
    text = SMALLEST.replace(instead_of, wrong)
    message = str(refusal(tmp_path, text))
    key = wrong.partition(":")[0]
    reported = next(line for line in message.splitlines() if "no such key" in line)
    assert f"{tmp_path}/run.yaml:" in reported
    assert f"{key}: no such key (did you mean {suggestion}?)" in reported


def test_the_reported_line_is_the_line_of_the_key(tmp_path):
    text = SMALLEST.replace("total_steps: 10", "total_steps: 10\n  # a comment\n\n  waight_decay: 0.1")
    (problem,) = refusal(tmp_path, text).problems
    assert problem.where == f"{tmp_path}/run.yaml:{line_of(text, 'waight_decay')}"


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(tmp_path):
    text = SMALLEST.replace("lr: 1e-3", "lr: 1e-3\n  global_batch_size: 8")
    (problem,) = refusal(tmp_path, text).problems
    assert problem.suggestion == "data.global_batch_size"


def test_a_key_like_no_other_gets_no_suggestion(tmp_path):
    (problem,) = refusal(tmp_path, SMALLEST + "xyzzy: 1\n").problems
    assert problem.message == "no such key"
    assert problem.suggestion == ""


def test_all_problems_of_all_kinds_come_in_one_error(tmp_path):
    text = (
        SMALLEST.replace("variant: tiny", "variant: tiny\n  windwo_size: 12")
        .replace("micro_batch_size: 4", "micro_batch_size: four")
        .replace("  total_steps: 10\n", "")
    )
    error = refusal(tmp_path, text + "sed: 3\n", "checkpoint.keep=1")
    keys = {problem.key for problem in error.problems}
    assert keys == {"model.windwo_size", "data.micro_batch_size", "optim.total_steps", "sed", "checkpoint.keep"}
    assert "5 problems" in str(error)
    assert f"swinv2-scale config check {tmp_path}/run.yaml" in error.next_step
    assert error.exit_code == ExitCode.BAD_CONFIG == 78


def test_an_unknown_variant_does_not_hide_the_other_problems(tmp_path):
    error = refusal(tmp_path, SMALLEST, "model.variant=gaint", "data.micro_batch_size=3")
    assert {problem.key for problem in error.problems} == {"model.variant", "data.micro_batch_size"}
    assert "did you mean giant?" in str(error)
    for variant in ("tiny", "small", "base", "large", "huge", "giant"):
        assert variant in str(error)


@pytest.mark.parametrize("section", ["data", "task", "optim"])
def test_a_missing_section_is_required(tmp_path, section):
    tree = yaml.safe_load(SMALLEST)
    tree["optim"]["lr"] = 0.001
    del tree[section]
    (problem,) = refusal(tmp_path, yaml.safe_dump(tree)).problems
    assert (problem.key, problem.message) == (section, "is required")


def test_a_missing_key_is_located_at_its_section(tmp_path):
    text = SMALLEST.replace("  train: shards/a.tar\n", "")
    (problem,) = refusal(tmp_path, text).problems
    assert (problem.key, problem.message) == ("data.train", "is required")
    assert problem.where == f"{tmp_path}/run.yaml:{line_of(text, 'global_batch_size')}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=fast", "fast"),
        ('optim.lr="1e-3"', "1e-3"),
        ("seed=3.0", "3.0"),
        ("seed=true", "true"),
        ("seed=-1", "-1"),
        ("data.shuffle=1", "1"),
        ("data.train=3", "3"),
        ("model=3", "3"),
        ("model=", "null"),
        ("model.window_size=[1, 2, 3]", "[1, 2, 3]"),
        ("model.depths=[]", "[]"),
        ("engine.zero_stage=4", "4"),
        ("engine.precision=fp16", "fp16"),
        ("task.mask_ratio=0", "0"),
        ("optim.lr=.nan", ".nan"),
        ("data.pixel_mean=[0.5, half, 0.5]", "half"),
    ],
)
def test_a_value_of_the_wrong_type_is_shown_as_it_was_written(tmp_path, override, says):
    (problem,) = refusal(tmp_path, SMALLEST, override).problems
    assert problem.key == override.partition("=")[0]
    assert says in problem.message
    assert problem.where == f"command line {override!r}"


def test_a_value_that_fits_no_branch_of_a_union_is_one_problem(tmp_path):
    (problem,) = refusal(tmp_path, SMALLEST, "model.image_size=big").problems
    assert problem.key == "model.image_size"
    assert "integer" in problem.message
    assert "tuple" in problem.message


def test_a_whole_number_is_fine_where_a_fraction_is_expected(tmp_path):
    assert loaded(tmp_path, SMALLEST, "optim.lr=1").config.optim.lr == 1.0


def test_an_infinite_learning_rate_is_refused(tmp_path):
    assert "optim.lr" in str(refusal(tmp_path, SMALLEST, "optim.lr=.inf"))


@pytest.mark.parametrize("section", ["data", "optim", "model"])
def test_a_section_written_twice_is_refused_with_the_second_place(tmp_path, section):
    text = f"{SMALLEST}{section}:\n  seed: 1\n"
    message = str(refusal(tmp_path, text))
    assert f"{tmp_path}/run.yaml:{len(SMALLEST.splitlines()) + 1}: {section}: is written twice" in message


def test_a_key_written_twice_is_refused_with_its_whole_name(tmp_path):
    text = SMALLEST.replace("lr: 1e-3", "lr: 1e-3\n  lr: 1e-4")
    assert f"run.yaml:{line_of(text, '1e-4')}: optim.lr: is written twice" in str(refusal(tmp_path, text))


# What is not a configuration at all


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "3\n", "null\n"])
def test_a_file_that_holds_no_mapping_is_refused_by_name(tmp_path, text):
    message = str(refusal(tmp_path, text))
    assert f"{tmp_path}/run.yaml" in message
    assert "mapping" in message


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*/nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(path)


@pytest.mark.parametrize(
    "line",
    [
        "seed: [1",
        "seed: }",
        "\tseed: 1",
        "---\nseed: 1",
        pytest.param("seed: \x07", id="a control character"),
        pytest.param("seed: 2024-13-45", id="a date that no calendar has"),
    ],
)
def test_what_is_not_yaml_is_a_configuration_error_that_names_the_file(tmp_path, line):
    message = str(refusal(tmp_path, f"{SMALLEST}{line}\n"))
    assert f"{tmp_path}/run.yaml" in message


# Tags and aliases


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch {proof}"]',
        '!!python/object/new:os.system ["touch {proof}"]',
        "!!python/object/apply:os.system {{args: ['touch {proof}']}}",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!ours shards/a.tar",
        "!ours [shards/a.tar]",
    ],
)
def test_a_tag_is_refused_and_runs_nothing(tmp_path, value):
    proof = tmp_path / "proof"
    text = SMALLEST.replace("train: shards/a.tar", "train: " + value.format(proof=proof))
    try:
        message = str(refusal(tmp_path, text))
    finally:
        assert not proof.exists()
    assert f"run.yaml:{line_of(text, 'train:')}" in message


def test_a_tag_on_a_section_is_refused(tmp_path):
    text = SMALLEST.replace("task:\n", "task: !!python/object:swinv2_scale.config.run.SimMIMConfig\n")
    assert "run.yaml:" in str(refusal(tmp_path, text))


def test_an_alias_is_refused_with_its_line(tmp_path):
    text = SMALLEST.replace("train: shards/a.tar", "train: &shards shards/a.tar\n  validation: *shards")
    message = str(refusal(tmp_path, text))
    assert f"run.yaml:{line_of(text, '*shards')}" in message
    assert "alias" in message


def test_a_merge_key_is_refused(tmp_path):
    refusal(tmp_path, SMALLEST.replace("name: simmim", "<<: {mask_ratio: 0.5}\n  name: simmim"))


def test_a_tag_on_the_command_line_is_refused_and_runs_nothing(tmp_path):
    proof = tmp_path / "proof"
    try:
        refusal(tmp_path, SMALLEST, f"data.train=!!python/object/apply:os.system ['touch {proof}']")
    finally:
        assert not proof.exists()


# Numbers


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "+1e-3", "0.1e-2", ".1e-2", "0.001"])
def test_every_way_to_write_a_thousandth_is_a_number_in_file_and_override(tmp_path, text):
    in_file = loaded(tmp_path, SMALLEST.replace("lr: 1e-3", f"lr: {text}"))
    in_override = loaded(tmp_path, SMALLEST.replace("lr: 1e-3", "lr: 1.0"), f"optim.lr={text}")
    assert in_file.config.optim.lr == in_override.config.optim.lr == 0.001


def test_underscores_group_digits(tmp_path):
    text = SMALLEST + "engine:\n  reduce_bucket_elements: 5_000_000\n"
    assert loaded(tmp_path, text).config.engine.reduce_bucket_elements == 5_000_000


# extends


def test_a_file_takes_the_rest_from_the_file_that_it_extends(tmp_path):
    written(tmp_path, SMALLEST, "base.yaml")
    config = loaded(tmp_path, "extends: base.yaml\noptim:\n  lr: 2e-3\n").config
    assert config.optim.lr == 0.002
    assert config.optim.total_steps == 10
    assert config.data.train == "shards/a.tar"


def test_extends_makes_chains_relative_to_each_file(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path, SMALLEST, "base.yaml")
    written(tmp_path / "deep", "extends: ../base.yaml\noptim: {lr: 2e-3, weight_decay: 0.1}\n", "middle.yaml")
    result = loaded(tmp_path, "extends: deep/middle.yaml\noptim: {lr: 3e-3}\n")
    assert (result.config.optim.lr, result.config.optim.weight_decay) == (0.003, 0.1)
    assert result.config.optim.total_steps == 10


def test_of_several_extended_files_the_later_wins(tmp_path):
    written(tmp_path, SMALLEST, "base.yaml")
    written(tmp_path, "optim: {lr: 2e-3}\nseed: 5\n", "faster.yaml")
    config = loaded(tmp_path, "extends: [base.yaml, faster.yaml]\n").config
    assert (config.optim.lr, config.optim.total_steps, config.seed) == (0.002, 10, 5)


def test_one_file_may_be_extended_along_two_paths(tmp_path):
    written(tmp_path, SMALLEST, "base.yaml")
    written(tmp_path, "extends: base.yaml\nseed: 1\n", "left.yaml")
    written(tmp_path, "extends: base.yaml\ncheckpoint: {keep: 5}\n", "right.yaml")
    config = loaded(tmp_path, "extends: [left.yaml, right.yaml]\n").config
    assert (config.seed, config.checkpoint.keep) == (1, 5)


def test_a_missing_base_is_named_with_the_file_that_asked_for_it(tmp_path):
    message = str(refusal(tmp_path, "extends: nowhere.yaml\n"))
    assert f"{tmp_path}/nowhere.yaml" in message
    assert f"extended by {tmp_path}/run.yaml" in message


def test_a_file_that_extends_itself_is_refused(tmp_path):
    assert "extends itself" in str(refusal(tmp_path, "extends: run.yaml\n" + SMALLEST))


def test_a_circle_of_files_is_refused_with_the_whole_circle(tmp_path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    written(tmp_path, "extends: run.yaml\n", "b.yaml")
    message = str(refusal(tmp_path, "extends: a.yaml\n"))
    assert "extends itself" in message
    assert all(f"{tmp_path}/{name}.yaml ->" in message for name in ("run", "a", "b"))


@pytest.mark.parametrize("value", ["5", "true", "[base.yaml, 5]"])
def test_extends_takes_nothing_but_file_names(tmp_path, value):
    written(tmp_path, SMALLEST, "base.yaml")
    refusal(tmp_path, f"extends: {value}\n{SMALLEST}")


def test_a_mistake_in_a_base_is_located_in_the_base(tmp_path):
    text = SMALLEST.replace("lr: 1e-3", "lr: 1e-3\n  epsilon: 1e-8")
    written(tmp_path, text, "base.yaml")
    (problem,) = refusal(tmp_path, "extends: base.yaml\nseed: 1\n").problems
    assert problem.where == f"{tmp_path}/base.yaml:{line_of(text, 'epsilon')}"


# Overrides


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optim.lr=2e-4", ("optim", "lr"), 0.0002),
        ("seed=7", ("seed",), 7),
        ("data.shuffle=false", ("data", "shuffle"), False),
        ("data.validation=null", ("data", "validation"), None),
        ("data.validation=", ("data", "validation"), None),
        ("data.train=[a.tar, b.tar]", ("data", "train"), ("a.tar", "b.tar")),
        ("data.train=shards/name=x.tar", ("data", "train"), "shards/name=x.tar"),
        ('data.train="007"', ("data", "train"), "007"),
        ("model.window_size=[8, 16]", ("model", "window_size"), (8, 16)),
    ],
)
def test_an_override_is_read_as_yaml(tmp_path, word, key, value):
    text = SMALLEST + "  min_lr: 0.0\n"
    assert flatten(loaded(tmp_path, text, word).config)[key] == value


def test_the_last_override_wins(tmp_path):
    assert loaded(tmp_path, SMALLEST, "seed=1", "seed=2").config.seed == 2


def test_an_override_may_give_several_keys_of_a_section(tmp_path):
    optim = loaded(tmp_path, SMALLEST, "optim={lr: 2e-3, weight_decay: 0.1}").config.optim
    assert (optim.lr, optim.weight_decay, optim.total_steps) == (0.002, 0.1, 10)


def test_an_empty_mapping_means_the_same_in_an_override_as_in_a_file(tmp_path):
    text = SMALLEST + "engine:\n  deepspeed_overrides:\n    wall_clock_breakdown: true\n"
    written(tmp_path, text, "base.yaml")
    in_file = loaded(tmp_path, "extends: base.yaml\nengine:\n  deepspeed_overrides: {}\n")
    in_override = loaded(tmp_path, text, "engine.deepspeed_overrides={}")
    assert in_file.config.engine.deepspeed_overrides == {}
    assert in_override.config.engine.deepspeed_overrides == {}


@pytest.mark.parametrize("word", ["optim.lr", "=3", "", "--optim.lr=3", "-x=1"])
def test_a_malformed_override_is_refused_with_the_right_form(tmp_path, word):
    message = str(refusal(tmp_path, SMALLEST, word))
    assert repr(word) in message
    assert "key.path=value" in message


def test_an_override_that_is_not_yaml_is_refused_by_its_words(tmp_path):
    assert "command line 'optim.lr=[1'" in str(refusal(tmp_path, SMALLEST, "optim.lr=[1"))


@pytest.mark.parametrize("word", ["optim.lrr=1", "optim..lr=1", "optim.lr.x=1", ".lr=1"])
def test_an_override_of_an_unknown_key_is_refused(tmp_path, word):
    assert f"command line {word!r}" in str(refusal(tmp_path, SMALLEST, word))


# Variants and provenance


def test_a_variant_fills_in_the_fields_that_are_not_given(tmp_path):
    model = loaded(tmp_path, SMALLEST, "model.variant=large").config.model
    assert (model.embed_dim, model.depths, model.num_heads) == (192, (2, 2, 18, 2), (6, 12, 24, 48))


def test_any_field_of_a_variant_can_be_given(tmp_path):
    text = SMALLEST.replace("variant: tiny", "variant: tiny\n  depths: [1, 1, 1, 1]")
    model = loaded(tmp_path, text, "model.embed_dim=48").config.model
    assert (model.embed_dim, model.depths, model.num_heads) == (48, (1, 1, 1, 1), (3, 6, 12, 24))


def test_every_value_says_where_it_came_from(tmp_path):
    base = written(tmp_path, SMALLEST, "base.yaml")
    result = loaded(tmp_path, "extends: base.yaml\n\nseed: 3\n", "optim.lr=5e-4", "model.attention.backend=eager")
    assert result.origin(("data", "train")) == f"{base}:{line_of(SMALLEST, 'train:')}"
    assert result.origin(("seed",)) == f"{tmp_path}/run.yaml:3"
    assert result.origin(("optim", "lr")) == "command line 'optim.lr=5e-4'"
    assert result.origin(("model", "embed_dim")) == "variant tiny"
    assert result.origin(("optim", "eps")) == "default"
    assert result.origin(("model", "extra_norm_every")) == "default"


def test_a_free_mapping_says_where_it_came_from(tmp_path):
    text = SMALLEST + "engine:\n  deepspeed_overrides:\n    wall_clock_breakdown: true\n"
    assert loaded(tmp_path, text).origin(("engine", "deepspeed_overrides")).startswith(f"{tmp_path}/run.yaml:")


def test_overridden_values_are_listed_newest_first(tmp_path):
    base = written(tmp_path, SMALLEST, "base.yaml")
    result = loaded(tmp_path, "extends: base.yaml\noptim:\n  lr: 2e-3\n", "optim.lr=3e-3", "optim.lr=4e-3")
    assert result.overridden(("optim", "lr")) == (
        "0.003 (command line 'optim.lr=3e-3')",
        f"0.002 ({tmp_path}/run.yaml:3)",
        f"0.001 ({base}:{line_of(SMALLEST, 'lr:')})",
    )
    assert result.overridden(("optim", "total_steps")) == ()
    assert result.overridden(("optim", "eps")) == ()


# to_yaml


def read_back(folder: Path, result: LoadedConfig) -> RunConfig:
    return load_config(written(folder, to_yaml(result), "resolved.yaml")).config


@pytest.mark.parametrize("variant", ["tiny", "small", "base", "large", "huge", "giant"])
def test_the_resolved_yaml_reads_back_as_the_same_run(tmp_path, variant):
    result = loaded(tmp_path, SMALLEST, f"model.variant={variant}", "optim.eps=1e-17", "optim.lr=0.1234567890123456")
    assert read_back(tmp_path, result) == result.config


def test_overrides_of_every_shape_read_back(tmp_path):
    text = SMALLEST + "engine:\n  deepspeed_overrides:\n    zero_optimization:\n      sub_group_size: 1000\n"
    result = loaded(
        tmp_path,
        text,
        "data.train=[a.tar, 'b c.tar']",
        "model.image_size=[192, 384]",
        "model.attention.backend=[eager, sequential, eager, eager]",
        "model.pretrained_window_sizes=[12, 12, 12, 6]",
        "cluster.world_size=8",
    )
    assert read_back(tmp_path, result) == result.config


@pytest.mark.parametrize(
    "name",
    [
        *["plain", "null", "yes", "3", "1.5", "0x10", "1_000", "1:30", "2024-01-01", "~", "", " lead", "trail "],
        *["a: b", "a #b", "#x", "- x", "*x", "&x", "!x", "{x}", "[x]", "'", '"', "\\n", "two\nlines", "é 漢", "="],
        *["1e3", "1e-3", "5.e1", ".5e1"],
    ],
)
def test_text_of_any_look_reads_back_as_the_same_text(tmp_path, name):
    # JSON's quoted strings are YAML's; an independent way to write the text.
    result = loaded(tmp_path, SMALLEST.replace("train:", f"shards_dir: {json.dumps(name)}\n  train:"))
    assert result.config.data.shards_dir == name
    assert read_back(tmp_path, result) == result.config


def test_the_resolved_yaml_names_the_origin_of_every_value(tmp_path):
    result = loaded(tmp_path, SMALLEST, "seed=3")
    lines = to_yaml(result).splitlines()
    for key in flatten(result.config):
        assert any(
            line.strip().startswith(f"{key[-1]}: ") and line.endswith(f"  # {result.origin(key)}") for line in lines
        ), key
    assert "seed: 3  # command line 'seed=3'" in lines


def test_the_resolved_yaml_is_plain_yaml_for_other_readers(tmp_path):
    tree = yaml.safe_load(to_yaml(loaded(tmp_path)))
    assert tree["optim"]["lr"] == 0.001
    assert tree["model"]["depths"] == [2, 2, 6, 2]


# What is loaded stays as it is


def test_a_loaded_configuration_cannot_be_changed(tmp_path):
    config = loaded(tmp_path).config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0
