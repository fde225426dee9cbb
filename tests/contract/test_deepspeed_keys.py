"""Our list of DeepSpeed's settings against the installed DeepSpeed: a key that it doesn't know would do nothing."""

import importlib
from types import ModuleType

import pytest

from swinv2_scale.config import deepspeed_keys
from swinv2_scale.config.loader import load_config

# Not deepspeed itself: on a machine without GPU this sets DS_ACCELERATOR first, as every job does.
from swinv2_scale.engine import deepspeed_import
from swinv2_scale.engine.deepspeed_config import translate
from tests.support.small_run import write_config

ZERO_OWNED = [k.removeprefix("zero_optimization.") for k in deepspeed_keys.OWNED_BY_CONFIG if "." in k]
TOP_OWNED = [k for k in deepspeed_keys.OWNED_BY_CONFIG if "." not in k]


def installed(module: str) -> ModuleType:
    return importlib.import_module(f"{deepspeed_import.deepspeed.__name__}.{module}")


def field_names(section: type) -> dict[str, object]:
    """A pydantic section's fields under the names that a configuration file uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def constants(module: ModuleType) -> set[str]:
    """All texts that a module of constants defines."""
    return {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}


@pytest.mark.parametrize("key", [*deepspeed_keys.ZERO_KEYS, *ZERO_OWNED])
def test_a_zero_key_is_a_field_of_deepspeed(key):
    field = field_names(installed("runtime.zero.config").DeepSpeedZeroConfig).get(key)
    assert field is not None
    assert not (field.json_schema_extra or {}).get("deprecated")


def test_what_is_sent_about_offloading_are_fields_of_deepspeed(tmp_path):
    places = ("optimizer_states=nvme", "parameters=nvme", f"nvme_dir={tmp_path}")
    config = load_config(write_config(tmp_path, tmp_path), [f"engine.offload.{place}" for place in places]).config
    zero = translate(config, 1)["zero_optimization"]
    sections = installed("runtime.zero.offload_config")
    assert set(zero) <= set(field_names(installed("runtime.zero.config").DeepSpeedZeroConfig))
    assert set(zero["offload_optimizer"]) <= set(field_names(sections.DeepSpeedZeroOffloadOptimizerConfig))
    assert set(zero["offload_param"]) <= set(field_names(sections.DeepSpeedZeroOffloadParamConfig))


@pytest.mark.parametrize("key", [*deepspeed_keys.TOP_KEYS, *TOP_OWNED])
def test_a_top_level_key_is_a_constant_of_deepspeed(key):
    assert key in constants(installed("runtime.constants"))


def test_the_section_has_deepspeeds_name():
    assert "zero_optimization" in constants(installed("runtime.zero.config"))


def test_no_key_is_listed_twice_nor_both_free_and_owned():
    keys = deepspeed_keys.DEEPSPEED_KEYS
    assert len(set(keys)) == len(keys)
    assert set(keys) & set(deepspeed_keys.OWNED_BY_CONFIG) == set()
