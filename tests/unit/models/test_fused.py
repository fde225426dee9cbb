"""What the fused attention of CPUs promises beside its numbers: bits, memory, threads, compilers, clean refusals."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_scale.models.ops.fused import fused
from swinv2_scale.models.ops.torch_attention import eager
from swinv2_scale.models.tiles import Tiling, tiling
from tests.support.fused_kernels import BY_NAME as KERNELS
from tests.support.fused_kernels import needs_fused, parameters

pytestmark = needs_fused
kernels = pytest.mark.parametrize("kernels", parameters([]))

CPU = torch.device("cpu")
NAMES = ("output", "qkv grad", "scale grad", "table grad")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(
    map_size: tuple[int, ...],
    window: tuple[int, ...],
    *,
    heads: int = 2,
    dim: int = 32,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    scale: float = 20.0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)
    sides = [2 * min(w, m) - 1 for w, m in zip(window, map_size, strict=True)]
    qkv = torch.randn(batch, math.prod(map_size), 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    table = 16 * torch.rand(heads, *sides, generator=generator, dtype=torch.float64)
    return qkv, torch.full((heads,), scale, dtype=wide), table.to(wide)


def results(attend: Any, given: tuple[Tensor, ...], tiles: Tiling) -> list[Tensor]:
    """Output, and the gradients of a fixed random projection of it."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = attend(*leaves, tiles)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards.to(out.dtype))]


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


# Numbers


@kernels
@pytest.mark.parametrize("dim", [2, 16, 32, 40, 48, 64])
def test_any_head_dim_agrees_with_eager(dim: int, kernels: str) -> None:
    tiles = tiling((7, 10), (4, 4), True, CPU)
    given = inputs((7, 10), (4, 4), dim=dim, dtype=torch.float64)
    for name, found, true in zip(
        NAMES, results(KERNELS[kernels], given, tiles), results(eager, given, tiles), strict=True
    ):
        # Float64 sums of at most 64 terms, in another order.
        assert error(found, true) < 1e-12, name


@kernels
@pytest.mark.parametrize(
    ("map_size", "window"),
    [((24, 24), (24, 24)), ((33, 19), (16, 16)), ((40, 6), (40, 6)), ((5, 6, 7), (4, 4, 4)), ((150,), (150,))],
)
def test_tiles_larger_than_a_block_agree_with_eager(
    map_size: tuple[int, ...], window: tuple[int, ...], kernels: str
) -> None:
    """More queries and keys than one block has, numbers that no vector divides, each axis the longest once."""
    tiles = tiling(map_size, window, True, CPU)
    given = inputs(map_size, window, batch=1, dtype=torch.float64)
    for name, found, true in zip(
        NAMES, results(KERNELS[kernels], given, tiles), results(eager, given, tiles), strict=True
    ):
        # Float64 sums of at most 600 terms of both signs, in another order.
        assert error(found, true) < 1e-11, name


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_about_as_eager_does(dtype: torch.dtype, kernels: str) -> None:
    tiles = tiling((24, 24), (12, 12), True, CPU)
    given = inputs((24, 24), (12, 12), dtype=dtype, scale=100.0)
    true = results(eager, tuple(x.double() for x in given), tiles)
    found, usual = (results(attend, given, tiles) for attend in (KERNELS[kernels], eager))
    for name, ours, theirs, exact in zip(NAMES, found, usual, true, strict=True):
        # Powers of two instead of e, sums in another order, and in bfloat16 a second rounding: of the output that is
        # read again, and of weights before products.
        assert error(ours, exact) < 8 * max(error(theirs, exact), torch.finfo(dtype).eps / 4), name


@kernels
def test_rows_whose_largest_score_comes_late_move_their_reference(kernels: str) -> None:
    """Scores grow from key to key by hundreds of powers of two: sums of earlier keys must be scaled down to nothing."""
    side = 160
    qkv, scale, table = inputs((side,), (side,), heads=1, batch=1, scale=100.0)
    angle = torch.linspace(math.pi, 0, side)
    qkv[0, :, 1, 0] = 0
    qkv[0, :, 1, 0, 0], qkv[0, :, 1, 0, 1] = angle.cos(), angle.sin()
    qkv[0, :, 0, 0] = torch.eye(32)[0]
    tiles = tiling((side,), (side,), False, CPU)
    true = results(eager, (qkv.double(), scale.double(), table.double()), tiles)
    for name, found, exact in zip(NAMES, results(KERNELS[kernels], (qkv, scale, table), tiles), true, strict=True):
        # Logits of 100 are rounded at 1e-5.
        assert error(found, exact) < 1e-4, name


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_a_number_stays_visible(part: int, dtype: torch.dtype, kernels: str) -> None:
    """A guard that looks for NaN must find it, whichever of q, k and v has it."""
    tiles = tiling((8, 8), (4, 4), False, CPU)
    given = inputs((8, 8), (4, 4), dtype=dtype)
    given[0][0, 5, part, 1, 2] = math.nan
    out, qkv_grad, *_ = results(KERNELS[kernels], given, tiles)
    assert out[0, 5, 1].isnan().all() if part < 2 else out[0, 5, 1, 2].isnan()
    assert qkv_grad.isnan().any()
    assert out[1].isfinite().all()
    assert out[:, :, 0].isfinite().all()


def test_one_token_alone_passes_no_gradient_but_to_its_value() -> None:
    given = inputs((1, 1), (4, 4), batch=3)
    out, qkv_grad, scale_grad, table_grad = results(fused, given, tiling((1, 1), (4, 4), False, CPU))
    torch.testing.assert_close(out, given[0][:, :, 2], rtol=1e-6, atol=0)  # a division by a sum of 1
    assert (qkv_grad[:, :, :2] == 0).all()
    assert (scale_grad == 0).all()
    assert (table_grad == 0).all()


def test_float64_gradients_are_those_of_finite_differences() -> None:
    tiles = tiling((3, 4), (2, 3), True, CPU)
    given = [x.requires_grad_() for x in inputs((3, 4), (2, 3), dim=3, batch=1, dtype=torch.float64, scale=3.0)]
    assert torch.autograd.gradcheck(lambda *x: fused(*x, tiles), given)


# Bits and threads


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_for_any_number_of_threads(dtype: torch.dtype, kernels: str) -> None:
    tiles = tiling((20, 26), (8, 8), True, CPU)
    given = inputs((20, 26), (8, 8), heads=3, dtype=dtype)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(results(KERNELS[kernels], given, tiles))
    for other in found[1:]:
        for name, one, two in zip(NAMES, found[0], other, strict=True):
            assert torch.equal(one, two), name


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_work_as_torch_has(threads: int) -> None:
    tiles = tiling((64, 64), (16, 16), False, CPU)
    given = inputs((64, 64), (16, 16), heads=4)
    torch.set_num_threads(threads)
    seen = set()
    for _ in range(5):  # a thread that comes late may find nothing left to do
        results(fused, given, tiles)
        seen.add(torch.ops.swinv2_scale.num_workers())
    assert max(seen) == threads


# Memory


def test_it_keeps_qkv_the_output_and_one_number_a_token_and_head() -> None:
    tiles = tiling((24, 24), (24, 24), False, CPU)
    given = tuple(x.requires_grad_() for x in inputs((24, 24), (24, 24), batch=1))
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        out = fused(*given, tiles)
    small = sum(x.nbytes for x in (given[1], given[2], tiles.order))
    one_a_token = 24 * 24 * 2 * 4
    assert sum(x.nbytes for x in kept.values()) == given[0].nbytes + out.nbytes + one_a_token + small


def test_nothing_of_queries_times_keys_is_made() -> None:
    """The largest single allocation that torch sees, of a window whose scores would be 21 MB a head."""
    side = 48
    given = inputs((side, side), (side, side), heads=1, batch=1)
    leaves = [x.requires_grad_() for x in given]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fused(*leaves, tiling((side, side), (side, side), False, CPU)).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert 0 < largest < side**4 * 4 / 2


# Under torch's other machinery


def test_opcheck_finds_nothing() -> None:
    tiles = tiling((7, 10), (4, 4), True, CPU)
    given = [x.requires_grad_() for x in inputs((7, 10), (4, 4))]
    num_tiles, sides = [g.num_tiles for g in tiles.groups], [s for g in tiles.groups for s in g.shape]
    torch.library.opcheck(torch.ops.swinv2_scale.window_attention.default, (*given, tiles.order, num_tiles, sides))
    with torch.no_grad():
        out, sums = torch.ops.swinv2_scale.window_attention(*given, tiles.order, num_tiles, sides)
    qkv, scale, table = (x.detach() for x in given)
    torch.library.opcheck(
        torch.ops.swinv2_scale.window_attention_backward.default,
        (torch.randn_like(out), qkv, out, sums, scale, table, tiles.order, num_tiles, sides),
        test_utils=("test_schema", "test_faketensor"),  # nothing is differentiated twice
    )


def test_torch_compile_takes_it_whole() -> None:
    tiles = tiling((7, 10), (4, 4), True, CPU)
    given = inputs((7, 10), (4, 4))
    # aot_eager: traced and differentiated like by inductor, without its compiler.
    compiled = torch.compile(lambda *x: fused(*x, tiles) * 2, fullgraph=True, backend="aot_eager")
    found = results(lambda *x: compiled(*x[:3]), given, tiles)
    for one, two in zip(found, results(lambda *x: fused(*x) * 2, given, tiles), strict=True):
        assert torch.equal(one, two)


def test_a_checkpointed_attention_has_the_same_bits() -> None:
    tiles = tiling((7, 10), (4, 4), True, CPU)
    given = inputs((7, 10), (4, 4))
    again = partial(checkpoint, fused, use_reentrant=False)
    for one, two in zip(results(again, given, tiles), results(fused, given, tiles), strict=True):
        assert torch.equal(one, two)


def test_meta_tensors_have_shapes_and_no_numbers() -> None:
    tiles = tiling((7, 10), (4, 4), True, torch.device("meta"))
    given = [x.to("meta").requires_grad_() for x in inputs((7, 10), (4, 4), dtype=torch.bfloat16)]
    out = fused(*given, tiles)
    assert (out.shape, out.dtype, out.device.type) == ((2, 70, 2, 32), torch.bfloat16, "meta")
    assert [g.shape for g in torch.autograd.grad(out.sum(), given)] == [x.shape for x in given]


# What comes in


def test_inputs_and_gradients_that_lie_scattered_give_the_same() -> None:
    tiles = tiling((8, 8), (4, 4), True, CPU)
    qkv, scale, table = inputs((8, 8), (4, 4))
    scattered = (
        qkv.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        scale[:1].expand(2),
        table.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not any(x.is_contiguous() for x in (scattered[0], scattered[2]))
    for name, one, two in zip(
        NAMES, results(fused, scattered, tiles), results(fused, (qkv, scale, table), tiles), strict=True
    ):
        assert torch.equal(one, two), name
    leaf = qkv.clone().requires_grad_()
    out = fused(leaf, scale, table, tiles)
    (found,) = torch.autograd.grad(
        out.transpose(2, 3).contiguous().sum(), leaf, retain_graph=True
    )  # a strided gradient
    (wanted,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0, 16, 3, 2, 32), (2, 16, 3, 0, 32), (2, 16, 3, 2, 0)])
def test_nothing_in_gives_nothing_out(shape: tuple[int, ...]) -> None:
    tiles = tiling((4, 4), (4, 4), False, CPU)
    heads = shape[3]
    out, *gradients = results(fused, (torch.empty(shape), torch.ones(heads), torch.zeros(heads, 7, 7)), tiles)
    assert out.shape == (shape[0], 16, heads, shape[4])
    assert all((x == 0).all() for x in gradients)


GOOD: dict[str, Any] = {
    "qkv": torch.ones(1, 16, 3, 2, 32),
    "scale": torch.ones(2),
    "table": torch.zeros(2, 7, 7),
    "order": torch.arange(16),
    "num_tiles": [1],
    "sides": [4, 4],
}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"qkv": torch.ones(16, 3, 2, 32)}, "qkv must be"),
        ({"qkv": torch.ones(1, 16, 2, 2, 32)}, "qkv must be"),
        ({"qkv": torch.ones(1, 16, 3, 2, 32, dtype=torch.int32)}, "float32, float64 or bfloat16"),
        ({"qkv": torch.ones(1, 16, 3, 2, 64)[..., ::2]}, "contiguous"),
        ({"scale": torch.ones(3)}, "logit_scale must be"),
        ({"scale": torch.ones(2, dtype=torch.float64)}, "must be Float"),
        ({"table": torch.zeros(2, 49)}, "sides must have 1"),
        ({"table": torch.zeros(2, 6, 7)}, "must be odd"),
        ({"table": torch.zeros(2, 7, 7, 7, 7)}, "1 to 3 axes"),
        ({"table": torch.zeros(2, 5, 7)}, "doesn't fit"),
        ({"order": torch.arange(15)}, "order must be int64"),
        ({"order": torch.arange(16, dtype=torch.int32)}, "order must be int64"),
        ({"order": torch.zeros(16, dtype=torch.int64)}, "once"),
        ({"order": torch.arange(1, 17)}, "once"),
        ({"order": torch.arange(-1, 15)}, "once"),
        ({"num_tiles": [2]}, "more than L tokens"),
        ({"num_tiles": [-1]}, "1 to L tokens"),
        ({"num_tiles": []}, "sides must have"),
        ({"num_tiles": [2**62]}, "more than L tokens"),
        ({"num_tiles": [0]}, "of 16 tokens"),
        ({"sides": [4, 0]}, "doesn't fit"),
        ({"sides": [4, 2]}, "of 16 tokens"),
        ({"sides": [-4, -4]}, "doesn't fit"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(wrong: dict[str, Any], says: str) -> None:
    given = GOOD | wrong
    with pytest.raises(RuntimeError, match=says):
        torch.ops.swinv2_scale.window_attention(*given.values())


@pytest.mark.parametrize("which", ["grad_out", "out", "logsumexp"])
def test_a_backward_of_something_else_is_refused(which: str) -> None:
    out, sums = torch.ops.swinv2_scale.window_attention(*GOOD.values())
    given = {"grad_out": out, "qkv": GOOD["qkv"], "out": out, "logsumexp": sums, **dict(list(GOOD.items())[1:])}
    for wrong in (given[which][..., :-1], given[which].double(), given[which][:, :0]):
        with pytest.raises(RuntimeError, match="must be"):
            torch.ops.swinv2_scale.window_attention_backward(*(given | {which: wrong}).values())


def test_kernels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match="can't run kernels 'sse2'"):
        torch.ops.swinv2_scale.select_kernels("sse2")
