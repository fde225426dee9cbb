"""The continuous position bias: offsets, divisors, the table."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from swinv2_scale.geometry import coordinate_divisor
from swinv2_scale.models.position_bias import PositionBias, log_spaced_offsets
from tests.support.live_memory import saved_bytes

torch.set_num_threads(1)

CPU = torch.device("cpu")


def position_bias(num_heads: int = 3, pretrained_window: tuple[int, ...] = (12, 12), std: float = 0.5) -> PositionBias:
    """A bias MLP with random weights."""
    torch.manual_seed(3)
    module = PositionBias(num_heads, pretrained_window)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def released_offsets(window: tuple[int, int], divisor: tuple[int, int]) -> Tensor:
    """As microsoft/Swin-Transformer writes it: swin_transformer_v2.py, WindowAttention.__init__."""
    relative_coords_h = torch.arange(-(window[0] - 1), window[0], dtype=torch.float32)
    relative_coords_w = torch.arange(-(window[1] - 1), window[1], dtype=torch.float32)
    table = torch.stack(torch.meshgrid([relative_coords_h, relative_coords_w], indexing="ij")).permute(1, 2, 0)
    table = table.contiguous()
    table[..., 0] /= divisor[0]
    table[..., 1] /= divisor[1]
    table *= 8
    return torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / math.log2(8)


@pytest.mark.parametrize(("window", "divisor"), [((12, 12), (11, 11)), ((24, 24), (11, 11)), ((7, 5), (6, 4))])
def test_offsets_are_those_of_the_released_code_to_the_bit(window: tuple[int, int], divisor: tuple[int, int]) -> None:
    offsets = log_spaced_offsets(window, divisor, CPU)
    assert offsets.shape == (2 * window[0] - 1, 2 * window[1] - 1, 2)
    assert torch.equal(offsets, released_offsets(window, divisor))


@pytest.mark.parametrize("window", [2, 6, 8, 12, 16])
def test_an_offset_across_the_pretraining_window_maps_to_log2_of_nine_over_three(window: int) -> None:
    offsets = log_spaced_offsets((window, window), (window - 1, window - 1), CPU)
    # One float32 rounding of a number near 1.
    assert offsets.max().item() == pytest.approx(math.log2(9) / 3, rel=1e-6)
    assert offsets.min().item() == pytest.approx(-math.log2(9) / 3, rel=1e-6)
    assert (offsets[window - 1, window - 1] == 0).all()


@pytest.mark.parametrize(
    ("window", "largest"), [(12, 1.0566), (24, 1.383), (32, 1.519), (40, 1.625), (48, 1.712), (56, 1.786)]
)
def test_weights_from_windows_of_12_extrapolate_by_a_few_tenths(window: int, largest: float) -> None:
    offsets = log_spaced_offsets((window, window), coordinate_divisor((12, 12)), CPU)
    # The values of shared/facts/model.md 1.2 have three decimals.
    assert offsets.max().item() == pytest.approx(largest, abs=6e-4)


def test_offsets_ascend_with_y_first_and_are_odd() -> None:
    offsets = log_spaced_offsets((5, 3), (4, 2), CPU)
    assert (offsets[1:, :, 0] > offsets[:-1, :, 0]).all()
    assert (offsets[:, 1:, 1] > offsets[:, :-1, 1]).all()
    assert (offsets[:, :, 0] == offsets[:, :1, 0]).all()
    assert torch.equal(offsets, -offsets.flip(0, 1))


@pytest.mark.parametrize(
    ("pretrained", "effective", "divisor"),
    [
        ((12, 12), (12, 12), (11, 11)),
        ((12, 6), (12, 6), (11, 5)),  # on each axis
        ((12, 12), (24, 24), (11, 11)),  # the window of the first training, whatever is used now
        ((12, 12), (6, 6), (11, 11)),
        ((1, 4), (1, 4), (1, 3)),  # a window of one has no offsets; nothing is divided by zero
        ((1, 1), (4, 4), (1, 1)),
        ((8, 12, 12), (8, 12, 12), (7, 11, 11)),
    ],
)
def test_offsets_are_divided_by_the_pretraining_window_less_one(
    pretrained: tuple[int, ...], effective: tuple[int, ...], divisor: tuple[int, ...]
) -> None:
    assert coordinate_divisor(pretrained) == divisor
    module = position_bias(pretrained_window=pretrained)
    with torch.no_grad():
        table = module.table(effective, CPU)
        # The same MLP by hand, in float64 on float32 offsets: 512 float32 products of size one in each sum.
        hidden = log_spaced_offsets(effective, divisor, CPU).double() @ module[0].weight.double().T
        values = (hidden + module[0].bias.double()).relu() @ module[2].weight.double().T
        wanted = 16 / (1 + (-values).exp())
    assert table.shape == (3, *(2 * side - 1 for side in effective))
    torch.testing.assert_close(table.double(), wanted.movedim(-1, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pretrained", [(1, 1), (5, 1), (12, 12)])
@pytest.mark.parametrize("window", [(1, 1), (1, 5), (5, 1)])
def test_a_window_of_one_token_has_a_finite_table(window: tuple[int, int], pretrained: tuple[int, int]) -> None:
    module = position_bias(pretrained_window=pretrained)
    table = module.table(window, CPU)
    assert table.isfinite().all()
    table.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("window", [(1, 2), (6, 5), (16, 16), (20, 17), (4, 5, 6)])
def test_values_and_gradients_are_those_of_the_plain_mlp(window: tuple[int, ...]) -> None:
    """Computed in blocks of 256 offsets: fewer, one and several, the last one shorter."""
    module = position_bias(pretrained_window=window).double()
    plain = copy.deepcopy(module)
    offsets = log_spaced_offsets(window, coordinate_divisor(window), CPU).double()
    wanted = 16 * torch.sigmoid(plain(offsets)).movedim(-1, 0)
    found = module.table(window, CPU)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.rand_like(wanted)
    with torch.autocast("cpu", torch.bfloat16):  # backward isn't cast either
        (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_the_table_alone_is_kept_for_backward() -> None:
    module = position_bias()
    table = module.table((24, 24), CPU)
    kept = saved_bytes(
        lambda: module.table((24, 24), CPU), [*module.parameters(), log_spaced_offsets((24, 24), (11, 11), CPU)]
    )
    assert kept == table.nbytes  # the sigmoid's; the hidden layer would be 512 / 3 times as much


def test_biases_lie_between_0_and_16_and_start_near_8() -> None:
    wild = position_bias(std=0.2).table((12, 12), CPU)
    assert wild.min() > 0
    assert wild.max() < 16
    assert wild.max() - wild.min() > 1
    fresh = position_bias(std=0.02).table((12, 12), CPU)
    # 512 hidden units of about 0.02, weights of 0.02: values of some 0.01, and 16 * sigmoid has slope 4.
    assert (fresh - 8).abs().max() < 0.5


def test_a_bfloat16_module_computes_its_table_in_float32() -> None:
    module = position_bias().to(torch.bfloat16)
    rounded = copy.deepcopy(module).float()  # the same bfloat16 values, kept as float32
    with torch.autocast("cpu", torch.bfloat16):
        table = module.table((24, 24), CPU)
    assert table.dtype == torch.float32
    assert torch.equal(table, rounded.table((24, 24), CPU))
    table.sum().backward()
    assert module[0].weight.grad is not None
    assert module[0].weight.grad.dtype == torch.bfloat16


def test_a_float64_module_has_a_float64_table_from_float32_offsets() -> None:
    table = position_bias().double().table((6, 6), CPU)
    assert table.dtype == torch.float64
    assert log_spaced_offsets((6, 6), (5, 5), CPU).dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_offsets_are_float32_whatever_the_default_type_is(default: torch.dtype) -> None:
    log_spaced_offsets.cache_clear()
    torch.set_default_dtype(default)
    try:
        offsets = log_spaced_offsets((9, 10), (8, 9), CPU)
    finally:
        torch.set_default_dtype(torch.float32)
        log_spaced_offsets.cache_clear()
    assert offsets.dtype == torch.float32
    assert torch.equal(offsets, released_offsets((9, 10), (8, 9)))


def test_offsets_made_under_inference_mode_serve_training_too() -> None:
    log_spaced_offsets.cache_clear()
    with torch.inference_mode():
        log_spaced_offsets((4, 4), (3, 3), CPU)
    position_bias().table((4, 4), CPU).sum().backward()
