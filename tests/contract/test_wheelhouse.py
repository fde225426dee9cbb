"""benchmarks/wheelhouse.py: which packages it takes along. Fetching them needs an index."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheelhouse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheelhouse", REPOSITORY / "benchmarks" / "wheelhouse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_takes_what_a_run_needs_and_nothing_of_torch(wheelhouse: ModuleType) -> None:
    names = wheelhouse.needed({"torch", "numpy", "opencv-python-headless"}, "3.12")
    assert {"deepspeed", "fairscale", "webdataset", "pydantic-core", "hjson", "braceexpand"} <= set(names)
    assert [name for name in names if name.startswith(("torch", "nvidia", "triton", "sympy", "numpy", "opencv"))] == []


def test_without_exceptions_it_is_all_that_the_package_asks_for(wheelhouse: ModuleType) -> None:
    names = set(wheelhouse.needed({"torch"}, "3.12"))
    text = (REPOSITORY / "pyproject.toml").read_text()
    block = text.split("dependencies = [")[1].split("]\n")[0]
    asked = {canonicalize_name(Requirement(line.strip(' ",')).name) for line in block.split("\n") if line.strip()}
    assert asked - names == {"torch"}
