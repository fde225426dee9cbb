"""Window attention against attention written token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_scale.models.ops.attend import Attend, resolve
from swinv2_scale.models.ops.torch_attention import eager, sdpa, sequential
from swinv2_scale.models.tiles import tiling
from tests.support import fused_kernels

torch.set_num_threads(1)

CPU = torch.device("cpu")
BATCH, HEADS, DIM = 2, 3, 4

#: map, window
MAPS = {
    "dividing": ((8, 8), (4, 4)),
    "non-dividing": ((7, 10), (4, 4)),
    "odd window": ((8, 11), (5, 3)),
    "shorter than the window": ((3, 9), (4, 4)),
    "narrower than the window": ((9, 2), (4, 4)),
    "one tile": ((3, 4), (4, 4)),
    "three axes": ((3, 5, 4), (2, 3, 4)),
    "one axis": ((17,), (6,)),
}
#: Enough for: one row of one head of one tile; several rows; several heads; several tiles; everything.
SCORE_BYTES = (1, 1500, 6000, 20_000, 2**30)

BACKENDS: dict[str, Attend] = {
    "eager": eager,
    "sdpa": sdpa,
    **{f"sequential {size}": partial(sequential, max_score_bytes=size) for size in SCORE_BYTES},
    **fused_kernels.BY_NAME,
}
backends = pytest.mark.parametrize(
    "backend", fused_kernels.parameters([name for name in BACKENDS if name not in fused_kernels.BY_NAME])
)


def axis_label(position: int, length: int, window: int, shifted: bool) -> tuple[int, int]:
    """Window and mask region of a token along one axis: pad to whole windows, roll, cut, as the released code does."""
    shift = window // 2 if shifted and length > window else 0
    padded = math.ceil(length / window) * window
    rolled = (position - shift) % padded
    region = 0 if not shift or rolled < padded - window else 1 if rolled < padded - shift else 2
    return rolled // window, region


def brute_force(
    qkv: Tensor, scale: Tensor, table: Tensor, map_size: tuple[int, ...], window: tuple[int, ...], shifted: bool
) -> Tensor:
    """Each token on its own: who shares its window and region, their cosines, their biases, the weighted mean."""
    places = list(itertools.product(*map(range, map_size)))
    centre = [min(w, m) - 1 for w, m in zip(window, map_size, strict=True)]
    label = {
        p: tuple(axis_label(x, m, w, shifted) for x, m, w in zip(p, map_size, window, strict=True)) for p in places
    }
    out = []
    for i, query in enumerate(places):
        keys = [j for j, key in enumerate(places) if label[key] == label[query]]
        q, k, v = qkv[:, i, 0], qkv[:, keys, 1], qkv[:, keys, 2]
        lengths = q.norm(dim=-1)[:, None] * k.norm(dim=-1)
        cosine = torch.einsum("bnd,bknd->bkn", q, k) / lengths
        offsets = [tuple(c + a - b for c, a, b in zip(centre, query, places[j], strict=True)) for j in keys]
        bias = torch.stack([table[(slice(None), *offset)] for offset in offsets])
        weights = (cosine * scale + bias).softmax(1)
        out.append(torch.einsum("bkn,bknd->bnd", weights, v))
    return torch.stack(out, 1)


def random_inputs(
    map_size: tuple[int, ...], window: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, scale and table; scales differ by head unless one is given."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.promote_types(dtype, torch.float32)
    sides = [2 * min(w, m) - 1 for w, m in zip(window, map_size, strict=True)]
    qkv = torch.randn(BATCH, math.prod(map_size), 3, HEADS, DIM, generator=generator, dtype=torch.float64).to(dtype)
    scales = torch.tensor([1.0, 10.0, 37.0]) if scale is None else torch.full((HEADS,), scale)
    table = 16 * torch.rand(HEADS, *sides, generator=generator, dtype=torch.float64)
    return qkv, scales.to(wide), table.to(wide)


def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and the gradients of a fixed random projection of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards.to(out.dtype))]


@lru_cache
def expected(case: str, shifted: bool) -> list[Tensor]:
    map_size, window = MAPS[case]
    return with_gradients(
        partial(brute_force, map_size=map_size, window=window, shifted=shifted), random_inputs(map_size, window)
    )


@backends
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", MAPS)
def test_every_backend_agrees_with_attention_token_by_token(case: str, shifted: bool, backend: str) -> None:
    map_size, window = MAPS[case]
    tiles = tiling(map_size, window, shifted, CPU)
    found = with_gradients(partial(BACKENDS[backend], tiles=tiles), random_inputs(map_size, window))
    for name, ours, theirs in zip(
        ("output", "qkv grad", "scale grad", "table grad"), found, expected(case, shifted), strict=True
    ):
        # Sums of at most 24 float64 terms of size 1 to 40, in another order: some 1e-14; a wrong pair is above 1e-3.
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-12, name


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@backends
def test_bfloat16_inputs_differ_from_float32_eager_in_proportion_to_the_scale(backend: str, scale: float) -> None:
    map_size, window = MAPS["non-dividing"]
    tiles = tiling(map_size, window, True, CPU)
    qkv, scales, table = random_inputs(map_size, window, torch.bfloat16, scale)
    found = with_gradients(partial(BACKENDS[backend], tiles=tiles), (qkv, scales, table))
    wanted = with_gradients(partial(eager, tiles=tiles), (qkv.float(), scales, table))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    # The contract lets unit q and k be rounded once (2**-9 each): logits move by scale * 2**-8, weights by twice that,
    # the output by that share of the largest value, and its own rounding comes on top.
    largest = qkv[:, :, 2].abs().max().float()
    assert (found[0].float() - wanted[0]).abs().max() <= (2 * scale + 1) * 2**-8 * largest
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        # Gradients pass the same weights twice (softmax and its backward), and are rounded on their way in and out.
        assert (ours.float() - theirs).abs().max() <= (4 * scale + 4) * 2**-8 * theirs.abs().max()


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_eager_rounds_bfloat16_only_at_its_end(scale: float) -> None:
    map_size, window = MAPS["non-dividing"]
    tiles = tiling(map_size, window, True, CPU)
    qkv, scales, table = random_inputs(map_size, window, torch.bfloat16, scale)
    wide = eager(qkv.float(), scales, table, tiles)
    assert torch.equal(eager(qkv, scales, table, tiles), wide.bfloat16())


@backends
def test_autocast_around_attention_changes_nothing(backend: str) -> None:
    map_size, window = MAPS["non-dividing"]
    tiles = tiling(map_size, window, True, CPU)
    inputs = random_inputs(map_size, window, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = BACKENDS[backend](*inputs, tiles)
    assert torch.equal(inside, BACKENDS[backend](*inputs, tiles))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@backends
def test_zero_tokens_give_finite_numbers_and_take_no_gradient(backend: str, dtype: torch.dtype) -> None:
    map_size, window = MAPS["non-dividing"]
    tiles = tiling(map_size, window, True, CPU)
    qkv, scale, table = random_inputs(map_size, window, dtype, 100.0)
    zero = torch.zeros(qkv.shape[:2], dtype=torch.bool)
    zero[:, ::3] = True
    zero[1, :20] = True
    qkv[:, :, :2][zero] = 0  # q and k; values stay
    out, *gradients = with_gradients(partial(BACKENDS[backend], tiles=tiles), (qkv, scale, table))
    for x in (out, *gradients):
        assert x.isfinite().all()
    assert (gradients[0][:, :, :2][zero] == 0).all()
    assert (gradients[0][:, :, :2][~zero] != 0).any()
    assert (gradients[0][:, :, 2][zero] != 0).any()


@backends
def test_without_gradients_the_numbers_are_the_same(backend: str) -> None:
    # sdpa takes another kernel then.
    map_size, window = MAPS["non-dividing"]
    inputs = random_inputs(map_size, window)
    with torch.no_grad():
        out = BACKENDS[backend](*inputs, tiling(map_size, window, True, CPU))
    torch.testing.assert_close(out, expected("non-dividing", True)[0], rtol=1e-12, atol=1e-12)


@backends
def test_queries_of_zero_read_the_bias_alone(backend: str) -> None:
    map_size, window = (4, 4), (4, 4)
    qkv, scale, table = random_inputs(map_size, window)
    qkv[:, :, 0] = 0
    out = BACKENDS[backend](qkv, scale, table, tiling(map_size, window, False, CPU))
    first = table[:, 3 - torch.arange(4)[:, None], 3 - torch.arange(4)].flatten(1).softmax(-1)  # offsets 0, -1, -2, -3
    # Float64 sums of 16 terms.
    torch.testing.assert_close(out[:, 0], torch.einsum("nk,bknd->bnd", first, qkv[:, :, 2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1e-10, 1e-14, 1e-18])
@pytest.mark.parametrize("backend", fused_kernels.parameters(["eager"]))
def test_tokens_of_any_small_length_pass_finite_gradients(backend: str, length: float) -> None:
    map_size, window = (4, 4), (4, 4)
    tiles = tiling(map_size, window, False, CPU)
    qkv, scale, table = random_inputs(map_size, window, torch.float32, 10.0)
    qkv[:, :, :2] *= length
    # The true gradient of a cosine grows like 1 / length: 1e18 here, well inside float32.
    for x in with_gradients(partial(BACKENDS[backend], tiles=tiles), (qkv, scale, table)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@backends
def test_the_same_input_gives_the_same_bits_forward_and_backward(backend: str, dtype: torch.dtype) -> None:
    map_size, window = MAPS["odd window"]
    tiles = tiling(map_size, window, True, CPU)
    inputs = random_inputs(map_size, window, dtype)
    first, second = (with_gradients(partial(BACKENDS[backend], tiles=tiles), inputs) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@backends
def test_nothing_crosses_a_tile_border_even_at_the_largest_scale(backend: str) -> None:
    map_size, window = (7, 10), (4, 4)
    qkv, scale, table = random_inputs(map_size, window, torch.float32, 100.0)
    qkv[:, :, 1] = qkv[:, 23:24, 0]  # every key is what one query looks for most
    qkv.requires_grad_()
    out = BACKENDS[backend](qkv, scale, table, tiling(map_size, window, True, CPU))
    places = list(itertools.product(*map(range, map_size)))
    labels = [tuple(axis_label(x, m, 4, True) for x, m in zip(p, map_size, strict=True)) for p in places]
    for token in (0, 23, 69):
        (gradient,) = torch.autograd.grad(out[:, token].sum(), qkv, retain_graph=True)
        elsewhere = torch.tensor([label != labels[token] for label in labels])
        assert (gradient[:, elsewhere] == 0).all()
        assert (gradient[:, ~elsewhere, 2] != 0).any()


def kept_for_backward(attend: Attend, side: int) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Distinct tensors that autograd keeps for one window of ``side`` x ``side``, and the inputs."""
    map_size = (side, side)
    inputs = tuple(x.requires_grad_() for x in random_inputs(map_size, map_size, torch.float32))
    kept: dict[tuple[object, ...], Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr(), x.shape, x.stride()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend(*inputs, tiling(map_size, map_size, False, CPU))
    assert out.requires_grad
    return list(kept.values()), inputs


def num_bytes(tensors: list[Tensor] | tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


@pytest.mark.parametrize("max_score_bytes", SCORE_BYTES)
@pytest.mark.parametrize("side", [4, 8, 16])
def test_sequential_keeps_its_inputs_and_nothing_else(side: int, max_score_bytes: int) -> None:
    kept, inputs = kept_for_backward(partial(sequential, max_score_bytes=max_score_bytes), side)
    assert max(x.numel() for x in kept) <= max(x.numel() for x in inputs)
    assert num_bytes(kept) <= num_bytes(inputs)


def test_what_eager_keeps_grows_with_the_fourth_power_of_the_window_and_sequential_with_the_second() -> None:
    kept = {
        name: [num_bytes(kept_for_backward(attend, side)[0]) for side in (8, 16)]
        for name, attend in (("eager", eager), ("sequential", partial(sequential, max_score_bytes=4096)))
    }
    # 16 and 4 in the limit; the smaller terms of eager, q and k and v, pull it down a little.
    assert kept["eager"][1] / kept["eager"][0] > 12
    assert kept["sequential"][1] / kept["sequential"][0] < 4.5


class LargestTensor(TorchDispatchMode):
    """The most bytes that any single operation made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.num_bytes = max(self.num_bytes, out.numel() * out.itemsize)
        return out


@pytest.mark.parametrize("max_score_bytes", [30_000, 100_000, 400_000])
def test_sequential_never_makes_a_tensor_above_its_limit_or_its_inputs(max_score_bytes: int) -> None:
    side = 12
    inputs = random_inputs((side, side), (side, side), torch.float32)
    tiles = tiling((side, side), (side, side), False, CPU)
    limit = max(max_score_bytes, *(x.numel() * x.itemsize for x in inputs))
    with LargestTensor() as seen:
        with_gradients(partial(sequential, tiles=tiles, max_score_bytes=max_score_bytes), inputs)
    assert 0 < seen.num_bytes <= limit
    with LargestTensor() as unlimited:
        with_gradients(partial(eager, tiles=tiles), inputs)
    assert unlimited.num_bytes > limit


def test_a_backend_is_found_by_its_name_and_an_unknown_one_is_not() -> None:
    map_size, window = MAPS["dividing"]
    inputs = random_inputs(map_size, window)
    tiles = tiling(map_size, window, True, CPU)
    results = [resolve(name, 4096)(*inputs, tiles) for name in ("eager", "sequential", "sdpa")]
    for other in results[1:]:
        # Float64, the same sums in another order.
        torch.testing.assert_close(results[0], other, rtol=1e-12, atol=1e-12)
    with pytest.raises(KeyError):
        resolve("flash", 4096)
