"""Our list of DeepSpeed's settings against the installed DeepSpeed: a key that it doesn't know would do nothing."""

import importlib
from types import ModuleType

import pytest

from swinv2_scale.config import deepspeed_keys

# Not deepspeed itself: on a machine without GPU this sets DS_ACCELERATOR first, as every job does.
from swinv2_scale.engine import deepspeed_import

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


@pytest.mark.parametrize("key", deepspeed_keys.OFFLOAD_OPTIMIZER_KEYS)
def test_an_optimizer_offload_key_is_a_field_of_deepspeed(key):
    assert key in field_names(installed("runtime.zero.offload_config").DeepSpeedZeroOffloadOptimizerConfig)


@pytest.mark.parametrize("key", deepspeed_keys.OFFLOAD_PARAM_KEYS)
def test_a_parameter_offload_key_is_a_field_of_deepspeed(key):
    assert key in field_names(installed("runtime.zero.offload_config").DeepSpeedZeroOffloadParamConfig)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_the_offload_sections_lie_in_the_zero_section(section):
    assert section in field_names(installed("runtime.zero.config").DeepSpeedZeroConfig)
    assert any(key.startswith(f"zero_optimization.{section}.") for key in deepspeed_keys.DEEPSPEED_KEYS)


@pytest.mark.parametrize("key", deepspeed_keys.AIO_KEYS)
def test_an_aio_key_is_read_by_deepspeed(key):
    aio = installed("runtime.swap_tensor.aio_config")
    assert key in aio.get_aio_config({"aio": {}})
    assert key in constants(installed("runtime.swap_tensor.constants"))


@pytest.mark.parametrize("key", [*deepspeed_keys.TOP_KEYS, *TOP_OWNED])
def test_a_top_level_key_is_a_constant_of_deepspeed(key):
    assert key in constants(installed("runtime.constants"))


@pytest.mark.parametrize("section", ["zero_optimization", "aio"])
def test_the_sections_have_deepspeeds_names(section):
    known = constants(installed("runtime.zero.config")) | constants(installed("runtime.swap_tensor.constants"))
    assert section in known


def test_no_key_is_listed_twice_nor_both_free_and_owned():
    keys = deepspeed_keys.DEEPSPEED_KEYS
    assert len(set(keys)) == len(keys)
    assert set(keys) & set(deepspeed_keys.OWNED_BY_CONFIG) == set()
