"""A map cut into tiles, and the bias table expanded for one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinv2_scale.models.tiles import tile_bias, tiling, to_map, to_tiles

torch.set_num_threads(1)

CPU = torch.device("cpu")


@st.composite
def maps(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Map, window, shifted; two or three axes."""
    num_axes = draw(st.integers(2, 3))
    longest = 20 if num_axes == 2 else 7
    map_size = draw(st.tuples(*[st.integers(1, longest)] * num_axes))
    window = draw(st.tuples(*[st.integers(1, 9)] * num_axes))
    return map_size, window, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(maps())
def test_every_token_is_in_exactly_one_tile(case: tuple[tuple[int, ...], tuple[int, ...], bool]) -> None:
    tiles = tiling(*case, CPU)
    length = math.prod(case[0])
    tokens = [token for group in tiles.groups for token in group.tokens.flatten().tolist()]
    assert sorted(tokens) == list(range(length))
    assert tiles.order.tolist() == tokens
    assert tiles.order[tiles.inverse].tolist() == list(range(length))
    assert tiles.inverse[tiles.order].tolist() == list(range(length))
    assert len(tiles.groups) <= 3 ** len(case[0])
    assert len({group.shape for group in tiles.groups}) == len(tiles.groups)


@settings(max_examples=100, deadline=None)
@given(maps())
def test_a_tile_is_a_box_of_neighbours_no_larger_than_the_window(
    case: tuple[tuple[int, ...], tuple[int, ...], bool],
) -> None:
    map_size, window, shifted = case
    tiles = tiling(map_size, window, shifted, CPU)
    assert tiles.window_size == tuple(map(min, window, map_size))
    places = list(itertools.product(*map(range, map_size)))
    for group in tiles.groups:
        assert all(side <= most for side, most in zip(group.shape, tiles.window_size, strict=True))
        assert group.num_tokens == math.prod(group.shape)
        for tile in group.tokens.tolist():
            corner = places[tile[0]]
            box = itertools.product(
                *(range(start, start + side) for start, side in zip(corner, group.shape, strict=True))
            )
            assert [places[token] for token in tile] == list(box)


def test_a_shifted_map_has_borders_half_a_window_after_those_of_a_plain_one() -> None:
    def first_rows(shifted: bool) -> list[int]:
        groups = tiling((16, 8), (8, 8), shifted, CPU).groups
        return sorted(token // 8 for group in groups for token in group.tokens[:, 0].tolist())

    assert first_rows(False) == [0, 8]
    assert first_rows(True) == [0, 4, 12]  # the second axis fits into one window and isn't shifted


@settings(max_examples=50, deadline=None)
@given(maps())
def test_tiles_and_back_is_the_identity_forward_and_backward(
    case: tuple[tuple[int, ...], tuple[int, ...], bool],
) -> None:
    tiles = tiling(*case, CPU)
    x = torch.arange(2.0 * math.prod(case[0]) * 3).view(2, -1, 3).requires_grad_()
    gathered = to_tiles(x, tiles)
    assert torch.equal(gathered, x[:, tiles.order])
    back = to_map(gathered, tiles)
    assert torch.equal(back, x)
    weight = torch.arange(float(x.numel())).view_as(x)
    (gradient,) = torch.autograd.grad((gathered * weight).sum(), x)
    assert torch.equal(gradient[:, tiles.order], weight)


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], slice]:
    """Window, tile shape within it, rows of the first axis."""
    num_axes = draw(st.integers(1, 3))
    window = draw(st.tuples(*[st.integers(1, 5)] * num_axes))
    shape = tuple(draw(st.integers(1, side)) for side in window)
    first = draw(st.integers(0, shape[0] - 1))
    last = draw(st.integers(first + 1, shape[0]))
    return window, shape, draw(st.sampled_from([slice(None), slice(first, last), slice(first, None)]))


def looked_up(table: Tensor, window: tuple[int, ...], shape: tuple[int, ...], rows: slice) -> Tensor:
    """The bias of each pair, looked up one at a time."""
    queries = list(itertools.product(range(shape[0])[rows], *map(range, shape[1:])))
    keys = list(itertools.product(*map(range, shape)))
    indices = [
        [tuple(w - 1 + a - b for w, a, b in zip(window, query, key, strict=True)) for key in keys] for query in queries
    ]
    return torch.stack([torch.stack([table[(slice(None), *index)] for index in row], -1) for row in indices], 1)


@settings(max_examples=150, deadline=None)
@given(tables())
def test_the_bias_of_a_pair_is_the_table_at_query_minus_key(
    case: tuple[tuple[int, ...], tuple[int, ...], slice],
) -> None:
    window, shape, rows = case
    sides = [2 * side - 1 for side in window]
    table = torch.arange(2.0 * math.prod(sides)).view(2, *sides)  # every entry differs
    assert torch.equal(tile_bias(table, shape, rows), looked_up(table, window, shape, rows))


def test_the_gradient_of_a_table_entry_counts_the_pairs_that_read_it() -> None:
    table = torch.zeros(1, 5, 7, requires_grad=True)  # window 3x4
    (gradient,) = torch.autograd.grad(tile_bias(table, (3, 3)).sum(), table)
    pairs = torch.tensor([[max(0, 3 - abs(dy)) * max(0, 3 - abs(dx)) for dx in range(-3, 4)] for dy in range(-2, 3)])
    assert torch.equal(gradient[0], pairs.float())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tiles_made_under_inference_mode_serve_training_too(device: str) -> None:
    map_size = (5, 6) if device == "cpu" else (6, 5)  # sizes that no other test asks for with this window
    with torch.inference_mode():
        tiles = tiling(map_size, (4, 3), True, torch.device(device))
    assert not tiles.order.is_inference()
    assert all(group.tokens.device.type == device for group in tiles.groups)
