"""The ``triton`` backend in Triton's interpreter, on a CPU. Run by test_triton_attention.py, in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/unit/models/triton_in_interpreter.py

Small: the interpreter takes milliseconds for what a kernel does in one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinv2_scale.models.ops import triton_attention
from swinv2_scale.models.ops.attend import resolve
from swinv2_scale.models.ops.torch_attention import eager
from swinv2_scale.models.ops.triton_attention import attend
from swinv2_scale.models.ops.triton_launches import Launch, Launches
from swinv2_scale.models.tiles import Tiling, tiling
from tests.parity.cases import Case, objective, our_random_model, random_images, relative_difference
from tests.parity.definition import definition_result
from tests.parity.test_definition import CASES
from tests.unit.models.test_attention import MAPS, axis_label, brute_force, random_inputs, with_gradients

torch.set_num_threads(1)

assert triton_attention.kernels.INTERPRETED.value, "TRITON_INTERPRET=1 has to be there before triton is imported"

CPU = torch.device("cpu")
NAMES = ("output", "qkv grad", "scale grad", "table grad")

#: float32: sums of at most 200 terms, of logits up to 53 that are rounded at 2**-24 of that (3e-6, and weights by as
#: much); some such roundings one after another. A wrong pair of tokens is above 1e-3.
TOLERANCE = 2e-5
#: A scale's gradient is a sum of terms of both signs, of which some percent are left.
CANCELLED = 2e-4


def launches(block_m: int, block_n: int, num_programs: int = 1, max_scratch_bytes: int = 2**20) -> Launches:
    one = Launch(block_m, block_n, 4, 1)
    return Launches(one, one, one, one, num_programs, max_scratch_bytes)


SMALL = launches(16, 16)


def one_head(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One image and one head of the contract's inputs, for time."""
    qkv, scale, table = inputs
    return qkv[:1, :, :, 1:2].contiguous(), scale[1:2], table[1:2].contiguous()


def of_tile(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype = torch.float32, batch: int = 1, heads: int = 1
) -> tuple[tuple[Tensor, Tensor, Tensor], Tiling]:
    """Random inputs for a map that is one tile; scales up to 37."""
    generator = torch.Generator().manual_seed(5)
    length = torch.Size(shape).numel()
    qkv = torch.randn(batch, length, 3, heads, dim, generator=generator).to(dtype)
    table = 16 * torch.rand(heads, *(2 * side - 1 for side in shape), generator=generator)
    return (qkv, torch.linspace(37.0, 5.0, heads), table), tiling(shape, shape, False, CPU)


def widened(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in inputs)


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        error = relative_difference(ours.double(), theirs)
        assert error < (max(tolerance, CANCELLED) if name == "scale grad" else tolerance), f"{name}: {error}"


# the contract's suite (test_attention.py), in float32


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("case", MAPS)
def test_it_agrees_with_attention_token_by_token(case: str, shifted: bool) -> None:
    map_size, window = MAPS[case]
    inputs = one_head(random_inputs(map_size, window, torch.float32))
    found = with_gradients(
        partial(attend, tiles=tiling(map_size, window, shifted, CPU), launches=launches(16, 16)), inputs
    )
    by_hand = partial(brute_force, map_size=map_size, window=window, shifted=shifted)
    assert_near(found, with_gradients(by_hand, widened(inputs)))


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_bfloat16_inputs_differ_from_float32_eager_in_proportion_to_the_scale(scale: float) -> None:
    map_size, window = MAPS["shorter than the window"]
    tiles = tiling(map_size, window, True, CPU)
    qkv, scales, table = one_head(random_inputs(map_size, window, torch.bfloat16, scale))
    found = with_gradients(partial(attend, tiles=tiles), (qkv, scales, table))
    wanted = with_gradients(partial(eager, tiles=tiles), (qkv.float(), scales, table))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    # The contract's bounds, test_attention.py.
    largest = qkv[:, :, 2].abs().max().float()
    assert (found[0].float() - wanted[0]).abs().max() <= (2 * scale + 1) * 2**-8 * largest
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert (ours.float() - theirs).abs().max() <= (4 * scale + 4) * 2**-8 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_tokens_give_finite_numbers_and_take_no_gradient(dtype: torch.dtype) -> None:
    map_size, window = MAPS["narrower than the window"]
    qkv, scale, table = one_head(random_inputs(map_size, window, dtype, 100.0))
    zero = torch.zeros(qkv.shape[:2], dtype=torch.bool)
    zero[:, ::3] = True
    zero[:, :8] = True  # a whole tile
    qkv[:, :, :2][zero] = 0  # q and k; values stay
    out, *gradients = with_gradients(partial(attend, tiles=tiling(map_size, window, False, CPU)), (qkv, scale, table))
    for x in (out, *gradients):
        assert x.isfinite().all()
    assert (gradients[0][:, :, :2][zero] == 0).all()
    assert (gradients[0][:, :, :2][~zero] != 0).any()
    assert (gradients[0][:, :, 2][zero] != 0).any()


@pytest.mark.parametrize("length", [1e-10, 1e-14, 1e-18])
def test_tokens_of_any_small_length_have_their_cosines_and_finite_gradients(length: float) -> None:
    inputs, tiles = of_tile((4, 4), 16)
    out = attend(*inputs, tiles)
    inputs[0][:, :, :2] *= length
    found = with_gradients(partial(attend, tiles=tiles), inputs)
    # The same cosines: rounding of q, k and the products.
    torch.testing.assert_close(found[0], out, rtol=TOLERANCE, atol=TOLERANCE)
    for x in found:
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits_forward_and_backward(dtype: torch.dtype) -> None:
    inputs, tiles = of_tile((3, 4), 16, dtype, batch=2)
    run = partial(with_gradients, partial(attend, tiles=tiles, launches=launches(16, 16, 100)), inputs)
    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_autocast_and_the_absence_of_gradients_change_nothing() -> None:
    inputs, tiles = of_tile((3, 4), 16)
    out = with_gradients(partial(attend, tiles=tiles), inputs)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*inputs, tiles), out)


def test_queries_of_zero_read_the_bias_alone() -> None:
    (qkv, scale, table), tiles = of_tile((4, 4), 16)
    qkv[:, :, 0] = 0
    out = attend(qkv, scale, table, tiles)
    first = table[:, 3 - torch.arange(4)[:, None], 3 - torch.arange(4)].flatten(1).softmax(-1)  # offsets 0, -1, -2, -3
    # Float32 sums of 16 terms of size one.
    torch.testing.assert_close(out[:, 0], torch.einsum("nk,bknd->bnd", first, qkv[:, :, 2]), rtol=1e-5, atol=1e-5)


def test_nothing_crosses_a_tile_border_even_at_the_largest_scale() -> None:
    map_size, window = MAPS["shorter than the window"]
    qkv, scale, table = one_head(random_inputs(map_size, window, torch.float32, 100.0))
    qkv[:, :, 1] = qkv[:, 13:14, 0]  # every key is what one query looks for most
    places = list(itertools.product(*map(range, map_size)))
    labels = [tuple(axis_label(x, m, 4, True) for x, m in zip(p, map_size, strict=True)) for p in places]
    tiles = tiling(map_size, window, True, CPU)
    gradient = with_gradients(lambda *x: attend(*x, tiles)[:, 13], (qkv, scale, table))[1]
    elsewhere = torch.tensor([label != labels[13] for label in labels])
    assert elsewhere.any()
    assert (gradient[:, elsewhere] == 0).all()
    assert (gradient[:, ~elsewhere, 2] != 0).any()


# what only these kernels have


#: Of a 5x8 tile, 40 tokens: blocks that repeat along the tile, the last one cut off.
CUTS = {
    "square blocks": launches(16, 16),
    "more rows": launches(32, 16),
    "more columns": launches(16, 32),
    "one block": launches(64, 64),
    "tiles in parts": launches(16, 16, num_programs=1000),
    "one block of scratch at a time": launches(32, 32, max_scratch_bytes=1),
    "three classes at a time": launches(32, 16, max_scratch_bytes=3 * 32 * 16 * 4),
}


@pytest.mark.parametrize("cut", CUTS)
def test_any_blocks_give_the_same_numbers(cut: str) -> None:
    # Two images where they are summed apart, two heads where they are cut.
    batch, heads = (2, 1) if cut == "tiles in parts" else (1, 2 if "classes" in cut else 1)
    inputs, tiles = of_tile((5, 8), 16, batch=batch, heads=heads)
    found = with_gradients(partial(attend, tiles=tiles, launches=CUTS[cut]), inputs)
    assert_near(found, with_gradients(partial(eager, tiles=tiles), widened(inputs)))


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 5), (3, 1, 4), (7,)], ids=str)
def test_any_axes_and_any_remainder(shape: tuple[int, ...]) -> None:
    inputs, tiles = of_tile(shape, 16)
    found = with_gradients(partial(attend, tiles=tiles, launches=SMALL), inputs)
    assert_near(found, with_gradients(partial(eager, tiles=tiles), widened(inputs)))


@pytest.mark.parametrize("dim", [32, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_head_dim(dim: int, dtype: torch.dtype) -> None:
    inputs, tiles = of_tile((3, 4), dim, dtype)
    found = with_gradients(partial(attend, tiles=tiles), inputs)
    # bfloat16: weights, dS and results are rounded, at 2**-8 at most, to either side.
    assert_near(
        found, with_gradients(partial(eager, tiles=tiles), widened(inputs)), TOLERANCE if dtype.itemsize == 4 else 1e-2
    )


def test_the_gradients_of_scale_and_table_are_not_spoilt_by_an_output_in_bfloat16() -> None:
    inputs, tiles = of_tile((8, 8), 32, torch.bfloat16)
    towards = torch.randn(1, 64, 1, 32, generator=torch.Generator().manual_seed(6)).bfloat16()

    def gradients(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = attention(*leaves, tiles)
        return torch.autograd.grad(out, leaves, towards.to(out.dtype))[1:]

    found = gradients(partial(attend, launches=launches(32, 32)), inputs)
    for ours, theirs in zip(found, gradients(eager, widened(inputs)), strict=True):
        # From q, k, v and dout in float32, as CANCELLED; with the rounded output's delta it is 1e-3 and more.
        assert (ours.double() - theirs).norm() / theirs.norm() < CANCELLED


def test_kept_for_backward_are_qkv_the_output_and_its_logsumexp() -> None:
    inputs, tiles = of_tile((4, 4), 16)
    leaves = [x.requires_grad_() for x in inputs]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend(*leaves, tiles)
    given = {x.data_ptr() for x in (*leaves, tiles.order, out)}
    (lse,) = [x for x in kept if x.data_ptr() not in given]
    assert lse.shape == (1, 1, 16)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed_it_gives_the_same_bits(how: str) -> None:
    inputs, tiles = of_tile((4, 4), 16)

    def run(qkv: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        return attend(2 * qkv, scale, table, tiles).square()

    wrapped: dict[str, Callable[..., Tensor]] = {
        "compiled": torch.compile(run, backend="aot_eager", fullgraph=True),
        "checkpointed": lambda *x: checkpoint(run, *x, use_reentrant=False),  # type: ignore[no-any-return]
    }
    for one, other in zip(with_gradients(run, inputs), with_gradients(wrapped[how], inputs), strict=True):
        assert torch.equal(one, other)


def test_torch_finds_nothing_wrong_with_the_operators() -> None:
    inputs, tiles = of_tile((2, 3), 16)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(triton_attention._forward, (*leaves, tiles.order, [1, 2, 3], SMALL.as_numbers()))


# in models


#: Tiles of two shapes, then of three shifted ones; two heads, two images.
SMALL_MODEL = Case((20, 12), 4, depths=(2,), heads=(2,), embed_dim=32)


def errors_against_the_definition(case: Case, backend: str) -> tuple[float, float]:
    """Of a float32 model's logits, and the largest of all gradients, against the float64 definition."""
    wanted = definition_result(case)
    model = our_random_model(case, attention={"backend": backend}).float()
    logits = model(random_images(case).float())
    objective(logits).backward()  # type: ignore[no-untyped-call]
    largest = max(float(x.abs().max()) for x in wanted.gradients.values())
    errors = []
    for name, theirs in wanted.gradients.items():
        difference = (model.get_parameter(name).grad.double() - theirs).abs().max()  # type: ignore[union-attr]
        # Where one token is a tile, the scale and the table have no gradient at all.
        errors.append(float(difference / max(theirs.abs().max(), 1e-3 * largest)))
    return relative_difference(logits.double(), wanted.outputs["logits"]), max(errors)


def assert_as_near_as_eager(case: Case) -> None:
    ours, of_eager = (errors_against_the_definition(case, backend) for backend in ("triton", "eager"))
    # Both round in float32, in another order; 5e-5 is what the other parts of a model make of either's rounding.
    assert ours[0] <= 4 * of_eager[0] + 5e-5
    assert ours[1] <= 4 * of_eager[1] + 5e-5


def test_a_model_is_as_near_to_the_definition_as_with_eager() -> None:
    assert_as_near_as_eager(SMALL_MODEL)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_every_model_is_as_near_to_the_definition_as_with_eager(name: str) -> None:
    assert_as_near_as_eager(CASES[name])


def test_it_is_found_by_its_name() -> None:
    assert resolve("triton", 0) is attend
    assert replace(SMALL, num_programs=2) == Launches.from_numbers(replace(SMALL, num_programs=2).as_numbers())
