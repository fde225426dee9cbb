"""Building the fused attention: where, by what, twice at once, not at all; and what ``auto`` makes of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from swinv2_scale import dist
from swinv2_scale.cli.main import main
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.start import settle_execution
from swinv2_scale.errors import ClusterError, ConfigError
from swinv2_scale.models.ops import attend, build, fused
from tests.support.small_run import write_config

#: A compiler that only writes the file that it is asked for: what is tested is where it goes.
COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done
"""
FAILS = """#!/bin/sh
echo "kernels.cpp:1:1: error: this compiler is from 1995" >&2
exit 1
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An environment in which nothing is built."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    attend.choose.cache_clear()
    yield tmp_path
    attend.choose.cache_clear()


def compiler(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "c++-for-tests"
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def test_it_is_built_into_the_environment_and_found_there(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(empty, COMPILER, monkeypatch)
    path = build.build()
    assert path == build.find()
    assert path.is_relative_to(empty / "prefix")
    assert torch.__version__ in path.parent.name
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing of the way there is left


def test_an_environment_that_can_not_be_written_sends_it_to_the_users_cache(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(empty, COMPILER, monkeypatch)
    (empty / "prefix").write_text("a file, where the folder of the environment should be")
    path = build.build()
    assert path == build.find()
    assert path.is_relative_to(empty / "cache")


def test_two_builds_at_once_leave_one_whole_library(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(empty, COMPILER, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(), range(4)))
    assert paths == {build.find()}
    assert paths.pop().read_text() == "compiled\n"


def test_other_sources_are_another_library(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.key()
    (empty / "csrc").mkdir()
    for source in build.SOURCES.iterdir():
        (empty / "csrc" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", empty / "csrc")
    assert build.key() == before
    with (empty / "csrc" / "simd.h").open("a") as file:
        file.write("\n")
    assert build.key() != before


def test_without_a_compiler_the_command_says_so_and_setup_goes_on(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(empty))
    assert main(["kernels", "build"]) == 78
    assert "no C++ compiler" in capsys.readouterr().err
    assert main(["kernels", "build", "--optional"]) == 0
    said = capsys.readouterr().out
    assert "no C++ compiler" in said
    assert said.count("\n") == 1


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(empty, FAILS, monkeypatch)
    with pytest.raises(ClusterError, match="from 1995"):
        build.build()
    assert build.find() is None
    assert [p for folder in build.places() if folder.exists() for p in folder.iterdir()] == []
    assert main(["kernels", "build", "--optional"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_fused_that_is_not_built_is_refused_with_what_to_run(empty: Path) -> None:
    with pytest.raises(ConfigError, match="not built") as caught:
        attend.resolve("fused", 1)
    assert "swinv2-scale kernels build" in caught.value.next_step
    assert caught.value.exit_code == 78


def test_a_library_that_can_not_be_loaded_is_refused_and_auto_does_without(
    empty: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(empty, COMPILER, monkeypatch)
    build.build()
    with pytest.raises(ConfigError, match="can't be loaded"):
        attend.resolve("fused", 1)
    with caplog.at_level(logging.WARNING):
        assert attend.choose() == "eager"
    assert "can't be loaded" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto means another thing on GPUs")
def test_auto_says_once_what_it_takes(empty: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attend.resolve("auto", 1)
    assert [r.message for r in caplog.records if "auto" in r.message] == [
        "attention: auto takes eager: fused is not built (swinv2-scale kernels build)"
    ]


def test_nothing_is_built_where_a_backend_is_chosen(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(empty, COMPILER, monkeypatch)
    attend.choose()
    with pytest.raises(ConfigError):
        attend.resolve("fused", 1)
    assert build.find() is None


@pytest.mark.parametrize("given", ["auto", "[sequential, auto]"])
def test_a_job_spells_out_what_auto_is(empty: Path, given: str) -> None:
    path = write_config(empty, empty / "shards")
    loaded = load_config(path, [f"model.attention.backend={given}", "model.attention.max_score_bytes=77"])
    dist.start(30)
    try:
        settled = settle_execution(loaded)
    finally:
        dist.stop()
    taken = attend.choose()
    wanted = taken if given == "auto" else ("sequential", taken)
    assert settled.config.model.attention.backend == wanted
    assert settled.config.model.attention.max_score_bytes == 77
    assert settled.origin(("model", "attention", "backend")) == "auto, on this machine"


ALL = ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


@pytest.mark.parametrize(
    ("capability", "usable", "taken"),
    [
        ("AVX512", ALL, "amx_bf16"),
        ("AVX512", ALL[:4], "avx512_bf16"),
        ("AVX512", ALL[:3], "avx512"),
        ("AVX2", ALL, "avx2"),  # ATEN_CPU_CAPABILITY=avx2: torch and we alike
        ("DEFAULT", ALL, "portable"),
        ("AVX512", ALL[:1], "portable"),
        ("NEON", ALL[:1], "portable"),
    ],
)
def test_the_kernels_are_the_best_that_the_cpu_has_and_torch_may_use(
    capability: str, usable: list[str], taken: str
) -> None:
    assert fused.best(capability, usable) == taken
