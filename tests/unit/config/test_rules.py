"""Rules that span sections: what is refused, which values are named as fitting, and what a resumed run may change."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_BY_CONFIG
from swinv2_scale.config.loader import flatten
from swinv2_scale.config.rules import _RESUME_POLICY, changes, cross_section_problems, resume_policy
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import TASK_SECTIONS
from swinv2_scale.errors import ConfigProblem

# 192 px and patches of 4: maps of 48, 24, 12 and 6 tokens; encoder stride 32 px.
VALID = {
    "model": {"variant": "tiny", "image_size": 192, "window_size": 12},
    "data": {"train": "a.tar", "global_batch_size": 24, "micro_batch_size": 8},
    "task": {"name": "simmim", "mask_patch_size": 32},
    "optim": {"lr": 1e-3, "total_steps": 100, "warmup_steps": 10},
}

# The machines that run this are shared: no example may fail for being slow.
thorough = settings(deadline=None, max_examples=60, database=None)


def config(**values) -> RunConfig:
    """A valid run with some values replaced; ``a__b=1`` is the key a.b."""
    tree = copy.deepcopy(VALID)
    for key, value in values.items():
        *sections, name = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return RunConfig.model_validate(tree)


def problems(**values) -> list[ConfigProblem]:
    return cross_section_problems(config(**values))


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_world_of_these_tests_is_valid():
    assert problems() == []


# Model


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.num_heads", (3, 6, 12)),
        ("model.num_heads", (3, 6, 12, 24, 48)),
        ("model.pretrained_window_sizes", (12, 12)),
        ("model.pretrained_window_sizes", ()),
        ("model.attention.backend", ("eager",)),
        ("model.attention.backend", ("eager",) * 5),
    ],
)
def test_a_list_with_an_entry_for_each_stage_must_have_as_many_as_depths(key, values):
    (problem,) = problems(**{key.replace(".", "__"): values})
    assert problem.key == key
    assert f"has {len(values)} entries" in problem.message
    assert "makes 4 stages" in problem.message
    assert problems(**{key.replace(".", "__"): (values or (12,))[:1] * 4}) == []


def test_heads_that_do_not_divide_the_width_are_told_numbers_that_do():
    (problem,) = problems(model__num_heads=(3, 6, 12, 25))
    assert problem.key == "model.num_heads"
    assert "stage 3 has width 768, which 25 heads" in problem.message
    named = numbers(problem.message.partition("near it")[2])
    assert 24 in named
    for heads in named:
        assert problems(model__num_heads=(3, 6, 12, heads)) == []


def test_every_stage_whose_heads_do_not_divide_is_named():
    assert len(problems(model__num_heads=(5, 5, 5, 5))) == 4


@given(width=st.integers(1, 200), heads=st.integers(1, 64))
@thorough
def test_heads_are_refused_exactly_where_they_do_not_divide_and_always_with_numbers_that_do(width, heads):
    found = problems(model__embed_dim=width, model__depths=(2,), model__num_heads=(heads,))
    assert bool(found) == (width % heads != 0)
    for problem in found:
        named = numbers(problem.message.partition("near it")[2])
        assert named, problem.message
        assert all(width % number == 0 for number in named)


@pytest.mark.parametrize("window", [49, 96, (12, 64)])
def test_a_window_larger_than_the_first_map_is_told_the_windows_that_fit(window):
    (problem,) = problems(model__window_size=window)
    assert problem.key == "model.window_size"
    assert "any up to 48" in problem.message
    # The divisors of 48 by hand.
    assert str([1, 2, 3, 4, 6, 8, 12, 16, 24, 48]) in problem.message


@pytest.mark.parametrize("window", [1, 7, 12, 24, 48, (12, 48)])
def test_a_window_up_to_the_first_map_is_fine_whether_it_divides_or_not(window):
    assert problems(model__window_size=window) == []


# Task


def test_a_mask_unit_that_is_no_whole_number_of_patches_is_told_its_neighbours():
    found = problems(task__mask_patch_size=30, model__image_size=960)
    problem = next(p for p in found if p.key == "task.mask_patch_size")
    assert "30 is not a multiple of model.patch_size 4; 28 and 32 fit" in problem.message
    for size in (28, 32):
        keys = [p.key for p in problems(task__mask_patch_size=size, model__image_size=960)]
        assert "task.mask_patch_size" not in keys


def test_a_mask_unit_smaller_than_a_patch_is_told_to_be_a_patch():
    found = problems(task__mask_patch_size=2)
    assert "4 and 8 fit" in next(p.message for p in found if p.key == "task.mask_patch_size")


@pytest.mark.parametrize(("size", "fit"), [(200, (192, 224)), (31, (32, 64)), (223, (192, 224))])
def test_an_image_that_holds_no_whole_mask_units_is_told_its_neighbours(size, fit):
    found = problems(model__image_size=size, model__window_size=6)
    problem = next(p for p in found if p.key == "model.image_size")
    assert f"{fit[0]} and {fit[1]} fit" in problem.message
    for neighbour in fit:
        assert problems(model__image_size=neighbour, model__window_size=6) == []


def test_the_image_must_hold_whole_mask_units_and_whole_strides():
    # lcm(48 px of a mask unit, 32 px of stride) = 96 px.
    found = problems(task__mask_patch_size=48, model__image_size=144)
    assert [p.key for p in found] == ["model.image_size"]
    assert "96 and 192 fit" in found[0].message
    for size in (96, 192):
        assert problems(task__mask_patch_size=48, model__image_size=size) == []


def test_each_side_of_an_oblong_image_is_checked():
    found = problems(model__image_size=(200, 100))
    assert [p.message.split()[0] for p in found] == ["200", "100"]
    assert problems(model__image_size=(192, 96)) == []


@pytest.mark.parametrize("window", [2, 46, 193, 201])
def test_a_target_window_must_be_odd_and_inside_the_image(window):
    (problem,) = problems(task__target_norm_window=window)
    assert problem.key == "task.target_norm_window"
    assert "odd" in problem.message
    assert "at most the image's 192 px" in problem.message


@pytest.mark.parametrize("window", [0, 3, 47, 191])
def test_target_windows_that_fit_are_fine(window):
    assert problems(task__target_norm_window=window) == []


def test_a_target_window_of_one_pixel_has_no_variance_and_is_refused():
    # The unbiased variance of one pixel is 0 / 0: the target, and with it the loss, would be NaN.
    assert [p.key for p in problems(task__target_norm_window=1)] == ["task.target_norm_window"]


# Data and optimisation


def test_a_micro_batch_that_does_not_divide_the_global_one_is_told_sizes_that_do():
    (problem,) = problems(data__global_batch_size=24, data__micro_batch_size=7)
    assert problem.key == "data.micro_batch_size"
    assert "[4, 6, 8, 12]" in problem.message or "[3, 4, 6, 8]" in problem.message


@given(total=st.integers(1, 5000), micro=st.integers(1, 600))
@thorough
def test_a_micro_batch_is_refused_exactly_where_it_does_not_divide(total, micro):
    found = problems(data__global_batch_size=total, data__micro_batch_size=micro)
    assert bool(found) == (total % micro != 0)
    for problem in found:
        named = numbers(problem.message.partition(";")[2])
        assert named
        assert all(total % number == 0 for number in named)


@pytest.mark.parametrize("key", ["pixel_mean", "pixel_std"])
def test_there_is_a_mean_and_a_deviation_for_each_channel(key):
    (problem,) = problems(**{f"data__{key}": (0.5,)})
    assert problem.key == f"data.{key}"
    assert "has 1 values, model.in_channels is 3" in problem.message
    assert problems(data__pixel_mean=(0.5,), data__pixel_std=(0.5,), model__in_channels=1) == []


@pytest.mark.parametrize("steps", [100, 101])
def test_warm_up_must_leave_something_of_the_training(steps):
    (problem,) = problems(optim__warmup_steps=steps)
    assert problem.key == "optim.warmup_steps"
    assert f"{steps} leaves nothing of optim.total_steps 100" in problem.message
    assert problems(optim__warmup_steps=99) == []


# Engine


def test_fairscale_with_autocast_is_refused_with_two_ways_out():
    wanted = {"engine__precision": "bf16_autocast", "engine__activation_checkpointing__backend": "fairscale"}
    (problem,) = problems(**wanted)
    assert problem.key == "engine.activation_checkpointing.backend"
    assert "use torch here, or precision bf16" in problem.message
    assert problems(**wanted | {"engine__activation_checkpointing__backend": "torch"}) == []
    assert problems(**wanted | {"engine__precision": "bf16"}) == []


@pytest.mark.parametrize("backend", ["none", "torch", "fairscale"])
def test_block_inputs_are_offloaded_where_blocks_are_checkpointed(backend):
    checkpointing = "engine__activation_checkpointing__"
    found = problems(**{f"{checkpointing}backend": backend, f"{checkpointing}offload": True})
    if backend != "none":
        assert found == []
        return
    (problem,) = found
    assert problem.key == "engine.activation_checkpointing.offload"
    assert "backend torch or fairscale" in problem.message


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("place", ["none", "cpu", "nvme"])
@pytest.mark.parametrize(
    ("what", "least"), [("optimizer_states", {"cpu": 1, "nvme": 3}), ("parameters", {"cpu": 3, "nvme": 3})]
)
def test_what_can_be_offloaded_depends_on_the_stage(what, least, place, stage):
    found = problems(
        engine__zero_stage=stage, **{f"engine__offload__{what}": place, "engine__offload__nvme_dir": "/scratch"}
    )
    if stage >= least.get(place, 0):
        assert found == []
        return
    (problem,) = found
    assert problem.key == f"engine.offload.{what}"
    assert f"it is {stage}" in problem.message


@pytest.mark.parametrize("what", ["optimizer_states", "parameters"])
def test_files_need_a_folder(what):
    (problem,) = problems(**{f"engine__offload__{what}": "nvme"})
    assert problem.key == "engine.offload.nvme_dir"
    assert f"engine.offload.{what} is nvme" in problem.message


def test_the_size_of_sub_groups_in_files_has_one_key():
    wanted = {"engine__deepspeed_overrides": {"zero_optimization": {"sub_group_size": 1000}}}
    assert problems(**wanted) == []
    (problem,) = problems(**wanted, engine__offload__optimizer_states="nvme", engine__offload__nvme_dir="/scratch")
    assert "engine.offload.sub_group_elements" in problem.message


@pytest.mark.parametrize(
    ("overrides", "key", "nearest"),
    [
        (
            {"zero_optimisation": {"sub_group_size": 1000}},
            "zero_optimisation.sub_group_size",
            "zero_optimization.sub_group_size",
        ),
        (
            {"zero_optimization": {"sub_group_sise": 1000}},
            "zero_optimization.sub_group_sise",
            "zero_optimization.sub_group_size",
        ),
        ({"wall_clock_brakdown": True}, "wall_clock_brakdown", "wall_clock_breakdown"),
        ({"aio": {"queue_depth": 8}}, "aio.queue_depth", None),  # its file operator isn't used
        ({"zero_optimization": {"qwzxj": 1}}, "zero_optimization.qwzxj", None),
    ],
)
def test_an_unknown_deepspeed_key_is_refused_with_the_nearest_one(overrides, key, nearest):
    (problem,) = problems(engine__deepspeed_overrides=overrides)
    assert problem.key == f"engine.deepspeed_overrides.{key}"
    assert problem.message == "no such DeepSpeed key"
    if nearest is not None:
        assert problem.suggestion == nearest


@pytest.mark.parametrize("key", OWNED_BY_CONFIG)
def test_a_deepspeed_key_that_we_have_a_key_for_is_refused_with_ours(key):
    overrides: dict = {}
    node = overrides
    *parents, name = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = 1
    (problem,) = problems(engine__deepspeed_overrides=overrides)
    assert problem.key == f"engine.deepspeed_overrides.{key}"
    assert OWNED_BY_CONFIG[key] in problem.message


def test_what_lies_below_an_owned_key_is_owned():
    (problem,) = problems(engine__deepspeed_overrides={"bf16": {"enabled": True}})
    assert "is set by engine.precision; change it there" in problem.message


def test_the_keys_that_own_deepspeed_settings_exist():
    keys = {".".join(key) for key in flatten(config())}
    sections = {key.partition(".")[0] for key in keys}
    for owner in OWNED_BY_CONFIG.values():
        for key in owner.split(" and "):
            assert key in keys | sections


def test_every_listed_deepspeed_key_is_accepted():
    overrides: dict = {}
    for key in DEEPSPEED_KEYS:
        node = overrides
        *parents, name = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = 1
    assert problems(engine__deepspeed_overrides=overrides) == []


def test_a_dotted_deepspeed_key_is_not_taken_for_the_nested_one():
    # DeepSpeed would ignore the top-level key "zero_optimization.sub_group_size" without a word.
    assert len(problems(engine__deepspeed_overrides={"zero_optimization.sub_group_size": 1000})) == 1


@pytest.mark.parametrize("overrides", [{"zero_optimization": {}}, {"zero_optimization": 3}, {"nonsense": {}}])
def test_a_deepspeed_section_without_keys_is_refused(overrides):
    assert len(problems(engine__deepspeed_overrides=overrides)) == 1


def test_independent_mistakes_are_all_found():
    found = problems(
        model__window_size=100,
        task__target_norm_window=46,
        data__micro_batch_size=7,
        optim__warmup_steps=1000,
        engine__deepspeed_overrides={"nonsense": 1},
    )
    assert [p.key for p in found] == [
        "model.window_size",
        "task.target_norm_window",
        "data.micro_batch_size",
        "optim.warmup_steps",
        "engine.deepspeed_overrides.nonsense",
    ]


# Resumption


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        ("seed", "fixed"),
        ("model.embed_dim", "fixed"),
        ("model.window_size", "fixed"),
        ("model.attention.backend", "warn"),
        ("model.attention.max_score_bytes", "warn"),
        ("data.global_batch_size", "fixed"),
        ("data.micro_batch_size", "warn"),
        ("data.shuffle_shards", "fixed"),
        ("data.num_workers", "free"),
        ("task.mask_ratio", "fixed"),
        ("optim.lr", "warn"),
        ("optim.betas", "fixed"),
        ("optim.warmup_steps", "fixed"),
        ("engine.precision", "warn"),
        ("engine.activation_checkpointing.offload", "free"),
        ("engine.offload.optimizer_states", "warn"),
        ("engine.offload.nvme_dir", "free"),
        ("engine.deepspeed_overrides.wall_clock_breakdown", "fixed"),
        ("checkpoint.keep", "free"),
        ("logging.tensorboard", "free"),
        ("cluster.world_size", "free"),
        ("a_key_of_next_year", "fixed"),
    ],
)
def test_what_a_resumed_run_may_do_with_a_key(key, policy):
    assert resume_policy(key) == policy


def test_a_policy_is_not_caught_by_a_name_that_only_begins_alike():
    assert resume_policy("loggings.tensorboard") == "fixed"
    assert resume_policy("optim.lr_scale") == "fixed"


def test_every_policy_names_a_key_or_a_section_that_exists():
    known = {".".join(key[:length]) for key in flatten(config()) for length in range(1, len(key) + 1)}
    known |= {f"task.{name}" for section in TASK_SECTIONS.values() for name in section.model_fields}
    assert set(_RESUME_POLICY) <= known


def flat(run: RunConfig) -> dict:
    return {".".join(key): value for key, value in flatten(run).items()}


def test_the_same_configuration_has_no_changes():
    assert changes(flat(config()), flat(config())) == []


def test_every_changed_key_is_listed_with_both_values_and_its_policy():
    saved = config()
    asked = config(seed=3, optim__lr=2e-3, logging__tensorboard=False)
    found = {change.key: change for change in changes(flat(saved), flat(asked))}
    assert {key: (c.saved, c.asked, c.policy) for key, c in found.items()} == {
        "seed": (0, 3, "fixed"),
        "optim.lr": (1e-3, 2e-3, "warn"),
        "logging.tensorboard": (True, False, "free"),
    }
    assert str(found["seed"]) == "seed: was 0, now 3 - may not change"
    assert "may change, changes the numbers" in str(found["optim.lr"])


def test_a_key_that_only_one_side_has_counts_as_none_on_the_other():
    (gone, new) = changes({"model.old": 1, "seed": 0}, {"model.new": 2, "seed": 0})
    assert (gone.key, gone.saved, gone.asked, gone.policy) == ("model.old", 1, None, "fixed")
    assert (new.key, new.saved, new.asked, new.policy) == ("model.new", None, 2, "fixed")
