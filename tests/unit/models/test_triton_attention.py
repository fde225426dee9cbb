"""The ``triton`` backend: its numbers in Triton's interpreter, its kernels compiled for a GPU, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from swinv2_scale.errors import ConfigError, ExitCode
from swinv2_scale.models.ops import triton_attention
from swinv2_scale.models.ops.attend import resolve
from swinv2_scale.models.ops.triton_attention import TableCut, attend
from swinv2_scale.models.ops.triton_launches import Launch, Launches, launches_for
from swinv2_scale.models.tiles import tiling
from tests.support.sm90 import compile_kernel

CASES = Path(__file__).with_name("triton_in_interpreter.py")
REPOSITORY = Path(__file__).parents[3]
#: Kernel -> its launch in a row of the table.
KERNELS = {
    "forward": "forward",
    "query_gradient": "query_gradient",
    "key_gradient": "key_gradient",
    "table_blocks": "table_gradient",
}


def in_interpreter(*arguments: str) -> None:
    """Triton asks once, as it is imported, whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr


@pytest.mark.system
def test_in_triton_s_interpreter_it_passes_the_contract_s_suite() -> None:
    in_interpreter()


@pytest.mark.sweep
def test_in_triton_s_interpreter_whole_models_are_those_of_the_definition() -> None:
    in_interpreter("-m", "sweep")


# Compiled for an H100 or H200


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_a_gpu_the_variants_heads_of_32_channels_use_matrix_units_and_spill_nothing(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = getattr(launches_for(32, 2, 144), KERNELS[kernel])
    found = compile_kernel(kernel, launch, 32, "bf16", full=False)
    assert found.spilled_bytes == 0
    assert found.registers <= 255
    assert found.shared_bytes <= 64 * 2**10  # three programs fit on a multiprocessor of 228 KB
    assert found.instructions["HGMMA"] >= 4
    # A gathered bias that goes through shared memory costs 64 of these for each block.
    assert found.instructions["LDGSTS"] <= 32


@pytest.mark.system
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [(16, "bf16"), (32, "bf16"), (64, "bf16"), (128, "bf16"), (32, "fp32")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_of_the_table_compiles_without_spilling(
    kernel: str, dim: int, dtype: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = getattr(launches_for(dim, 4 if dtype == "fp32" else 2, 2304), KERNELS[kernel])
    found = compile_kernel(kernel, launch, dim, dtype, full)
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= 227 * 2**10


class H200:
    """In the place of Triton's own driver: what is compiled for, of a device that isn't there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.system
def test_the_operators_launches_compile_as_they_are_written_and_few_variants_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the launch itself: arguments, their types, constants and options, of every shape of tile."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels: dict[str, set[int]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        kernels.setdefault(self.fn.__name__, set()).add(id(compiled))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", H200())
    for heads, side, window in ((3, 24, 16), (6, 12, 12)):
        qkv = torch.randn(2, side**2, 3, heads, 32, dtype=torch.bfloat16)
        tiles = tiling((side, side), (window, window), True, torch.device("cpu"))
        given = (qkv, torch.ones(heads), torch.zeros(heads, 2 * window - 1, 2 * window - 1), tiles.order)
        shapes = [number for group in tiles.groups for number in (group.num_tiles, *group.shape)]
        out, lse = triton_attention._forward(*given, shapes, [])
        triton_attention._backward(out, *given, out, lse, shapes, [])
    # Tiles that blocks divide and others, and the blocks of smaller tiles; not one for every size or number of heads.
    assert {name: len(variants) for name, variants in kernels.items()} == {
        "inverse_norms": 1,
        "forward": 3,
        "query_gradient": 2,
        "key_gradient": 2,
        "table_blocks": 2,
        "table_sum": 2,
    }


# The table's gradient


@pytest.mark.parametrize("max_scratch_bytes", [1, 2**20, 2**28])
@pytest.mark.parametrize("num_programs", [1, 1056])
@pytest.mark.parametrize(
    "shape", [(12, 12), (40, 40), (48, 48), (24, 48), (7, 9), (8, 7, 7), (1, 1), (96, 95)], ids=str
)
def test_scratch_stays_within_its_limit_and_all_tiles_are_in_one_part(
    shape: tuple[int, ...], num_programs: int, max_scratch_bytes: int
) -> None:
    tokens, tiles, heads = torch.Size(shape).numel(), 37, 16
    launch = Launch(64, 64, 4, 3).within(tokens)
    limits = Launches(launch, launch, launch, launch, num_programs, max_scratch_bytes)
    cut = TableCut.of(tokens, shape[0], tiles, heads, launch, limits)
    block = launch.block_m * launch.block_n * 4
    # One block is the least.
    assert cut.num_parts * cut.heads_at_once * cut.classes_at_once * block <= max(max_scratch_bytes, block)
    assert (cut.num_parts - 1) * cut.share < tiles <= cut.num_parts * cut.share
    assert 1 <= cut.heads_at_once <= heads
    assert 1 <= cut.classes_at_once <= cut.num_classes


@pytest.mark.parametrize(
    ("slabs", "plane", "block_m", "block_n"), [(12, 12, 64, 64), (48, 48, 128, 64), (9, 8, 16, 32)]
)
def test_blocks_of_one_class_have_the_same_offsets(slabs: int, plane: int, block_m: int, block_n: int) -> None:
    """Counted one by one: a class's first block and where its pairs of tokens lie, and the number of classes."""
    tokens = slabs * plane
    launch = Launch(block_m, block_n, 4, 1)
    cut = TableCut.of(tokens, slabs, 1, 1, launch, Launches(launch, launch, launch, launch))
    firsts = set()
    for row in range(-(-tokens // block_m)):
        for column in range(-(-tokens // block_n)):
            shifts = min(row // cut.rows_apart, column // cut.columns_apart)
            first = (row - shifts * cut.rows_apart, column - shifts * cut.columns_apart)
            firsts.add(first)
            moved = (row - first[0]) * block_m
            assert moved == (column - first[1]) * block_n
            assert moved % plane == 0  # whole slabs: the other axes stay, the first one moves for both alike
    assert len(firsts) == cut.num_classes


# What it refuses


def test_on_a_cpu_it_says_what_to_do() -> None:
    tiles = tiling((4, 4), (2, 2), True, torch.device("cpu"))
    with pytest.raises(ConfigError, match="GPUs") as caught:
        attend(torch.ones(1, 16, 3, 1, 32), torch.ones(1), torch.zeros(1, 3, 3), tiles)
    assert "model.attention.backend" in caught.value.next_step


@pytest.mark.parametrize(
    ("shape", "dtype", "found"),
    [
        ((1, 16, 3, 1, 32), torch.float64, "float64"),
        ((1, 16, 3, 1, 32), torch.float16, "float16"),
        ((1, 16, 3, 1, 160), torch.float32, "160 channels"),
        ((1, 16, 3, 2**20, 64), torch.float32, "3.2e[+]09 numbers"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(shape: tuple[int, ...], dtype: torch.dtype, found: str) -> None:
    tiles = tiling((4, 4), (2, 2), True, torch.device("meta"))
    with pytest.raises(ConfigError, match=found):
        attend(torch.ones(shape, dtype=dtype, device="meta"), torch.ones(1), torch.zeros(1, 3, 3), tiles)


def test_without_data_it_gives_shapes_and_types() -> None:
    with torch.device("meta"):
        qkv = torch.ones(2, 16, 3, 4, 32, dtype=torch.bfloat16, requires_grad=True)
        scale, table = torch.ones(4, requires_grad=True), torch.zeros(4, 3, 3, requires_grad=True)
    out = attend(qkv, scale, table, tiling((4, 4), (2, 2), True, torch.device("meta")))
    assert out.shape == (2, 16, 4, 32)
    assert out.dtype == torch.bfloat16
    out.sum().backward()  # type: ignore[no-untyped-call]
    for x in (qkv, scale, table):
        assert x.grad is not None
        assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


def test_where_triton_is_not_installed_only_asking_for_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("swinv2_scale.models.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["swinv2_scale.models.ops"], "triton_attention")
    monkeypatch.setitem(sys.modules, "triton", None)
    resolve("eager", 1)
    with pytest.raises(ConfigError, match="Triton isn't installed") as caught:
        resolve("triton", 1)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    assert "install torch for your GPU" in caught.value.next_step
    assert triton_attention  # of before
