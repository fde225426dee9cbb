"""The window rule, on maps of any size and any number of axes."""

import math
from collections import Counter
from itertools import groupby

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swinv2_scale import geometry

# The machines that run this are shared: no example may fail for being slow.
thorough = settings(deadline=None, max_examples=200, database=None)
lengths = st.integers(1, 200)
windows = st.integers(1, 64)


def tiles_by_hand(length: int, window: int, shift: int) -> list[tuple[int, int]]:
    """Token i lies in the window number floor((i - shift) / window) of an endless grid that starts at the shift."""
    groups = groupby(range(length), key=lambda i: (i - shift) // window)
    members = [list(tokens) for _, tokens in groups]
    return [(tokens[0], len(tokens)) for tokens in members]


def one_axis(window: int, length: int) -> tuple[int, int]:
    return geometry.effective_window((window,), (length,))[0], geometry.effective_shift((window,), (length,))[0]


@given(window=windows, length=lengths)
@thorough
def test_a_map_no_larger_than_the_window_is_one_tile_and_never_shifted(window, length):
    assume(length <= window)
    assert one_axis(window, length) == (length, 0)
    assert geometry.spans(length, length, 0) == [(0, length)]


@given(window=windows, length=lengths)
@thorough
def test_a_larger_map_has_whole_windows_shifted_by_half(window, length):
    assume(length > window)
    assert one_axis(window, length) == (window, window // 2)


@given(window=windows, length=lengths, shifted=st.booleans())
@thorough
def test_spans_cover_every_token_exactly_once_in_order(window, length, shifted):
    effective, shift = one_axis(window, length)
    spans = geometry.spans(length, effective, shift if shifted else 0)
    tokens = [token for start, size in spans for token in range(start, start + size)]
    assert tokens == list(range(length))
    assert all(0 < size <= effective for _, size in spans)


@given(window=windows, length=lengths, shifted=st.booleans())
@thorough
def test_spans_are_the_cells_of_a_shifted_grid(window, length, shifted):
    effective, shift = one_axis(window, length)
    shift = shift if shifted else 0
    assert geometry.spans(length, effective, shift) == tiles_by_hand(length, effective, shift)


@given(window=windows, length=lengths, shifted=st.booleans())
@thorough
def test_only_the_first_and_the_last_tile_can_be_smaller(window, length, shifted):
    effective, shift = one_axis(window, length)
    sizes = [size for _, size in geometry.spans(length, effective, shift if shifted else 0)]
    assert set(sizes[1:-1]) <= {effective}
    assert len(Counter(sizes)) <= 3


@given(window=windows, count=st.integers(2, 10))
@thorough
def test_on_a_dividing_map_the_shifted_tiles_are_the_regions_of_the_released_mask(window, count):
    # The released code rolls the map by window // 2 and masks: slices (0, -w), (-w, -shift), (-shift, None) get
    # numbers of their own, so the last rolled window is cut in two. Unrolled, the second part is the first tile.
    length, shift = window * count, window // 2
    rolled = [(i + shift) % length for i in range(length)]
    region = [0] * (length - window) + [1] * (window - shift) + [2] * shift
    parts: dict[tuple[int, int], list[int]] = {}
    for place, token in enumerate(rolled):
        parts.setdefault((place // window, region[place]), []).append(token)
    released = sorted((min(tokens), len(tokens)) for tokens in parts.values())
    assert geometry.spans(length, window, shift) == released


@pytest.mark.parametrize(
    ("window", "map_size", "effective", "shift"),
    [
        ((12, 12), (48, 48), (12, 12), (6, 6)),
        ((12, 12), (12, 12), (12, 12), (0, 0)),
        ((12, 12), (6, 6), (6, 6), (0, 0)),
        ((12, 12), (6, 48), (6, 12), (0, 6)),
        ((7, 7), (8, 7), (7, 7), (3, 0)),
        ((1, 1), (4, 4), (1, 1), (0, 0)),
        ((2, 7, 7), (8, 7, 56), (2, 7, 7), (1, 0, 3)),
    ],
)
def test_each_axis_follows_the_rule_on_its_own(window, map_size, effective, shift):
    assert geometry.effective_window(window, map_size) == effective
    assert geometry.effective_shift(window, map_size) == shift


@pytest.mark.parametrize("function", [geometry.effective_window, geometry.effective_shift])
def test_a_window_and_a_map_of_different_dimensions_do_not_go_together(function):
    with pytest.raises(ValueError, match="zip"):
        function((12, 12), (48, 48, 48))


@pytest.mark.parametrize(
    ("pretrained", "divisor"),
    [((12, 12), (11, 11)), ((6, 12), (5, 11)), ((1, 12), (1, 11)), ((1, 1), (1, 1)), ((8, 7, 7), (7, 6, 6))],
)
def test_offsets_are_divided_by_the_pre_training_window_minus_one(pretrained, divisor):
    assert geometry.coordinate_divisor(pretrained) == divisor


@given(image=st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64)), patch=st.integers(1, 32))
@thorough
def test_stage_maps_round_up_on_every_axis(image, patch):
    maps = geometry.stage_maps(image, patch, 4)
    for stage, size in enumerate(maps):
        # ceil(ceil(n / a) / b) == ceil(n / (a * b)), in integers: -(-n // m).
        assert size == tuple(-(-length // (patch * 2**stage)) for length in image)
    assert len(maps) == 4


@given(value=st.integers(1, 5000), divisor=st.integers(1, 300))
@thorough
def test_the_nearest_multiples_are_found_like_by_counting(value, divisor):
    lower, upper = geometry.nearest_multiples(value, divisor)
    counted = list(range(divisor, value + divisor + 1, divisor))
    assert lower == max([m for m in counted if m <= value], default=divisor)
    assert upper == lower + divisor
    assert math.gcd(lower, divisor) == divisor


def test_one_number_stands_for_all_axes_and_several_for_themselves():
    assert geometry.as_size(12, 2) == (12, 12)
    assert geometry.as_size(12, 3) == (12, 12, 12)
    assert geometry.as_size([12, 24], 2) == (12, 24)
