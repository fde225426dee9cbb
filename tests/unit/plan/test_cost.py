"""Parameters and multiply-adds counted from a configuration, against the model itself and against published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swinv2_scale import create_model
from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.models.tiles import tiling
from swinv2_scale.plan.cost import attention_pairs, num_multiply_adds, num_parameters

torch.set_num_threads(1)

#: (variant, image, window) -> billions of multiply-adds with 1000 classes, as Microsoft's README prints them.
README = {
    ("tiny", 256, 8): 5.9,
    ("tiny", 256, 16): 6.6,
    ("small", 256, 8): 11.5,
    ("small", 256, 16): 12.6,
    ("base", 256, 8): 20.3,
    ("base", 256, 16): 21.8,
    ("base", 384, 24): 54.7,
    ("large", 256, 16): 47.5,
    ("large", 384, 24): 115.4,
}
# FlopCounterMode knows torch's own products alone.
SMALL = {
    "linear": "torch",
    "attention": {"backend": "eager"},
    "image_size": 32,
    "embed_dim": 16,
    "depths": (2, 3),
    "num_heads": (2, 4),
    "window_size": 4,
}
ODD = {
    "one channel and a head": {"in_channels": 1, "num_classes": 7},
    "large patches": {"patch_size": 8},
    "three stages": {"depths": (1, 2, 7), "num_heads": (2, 4, 8)},
    "one stage": {"depths": (3,), "num_heads": (2,)},
    "a thin MLP whose width is rounded down": {"mlp_ratio": 2.3},
    "norms counted in each stage": {"depths": (5, 4), "extra_norm_every": 3},
    "norms counted through the model": {"depths": (5, 4), "extra_norm_every": 3, "extra_norm_counter": "model"},
    "heads of other widths": {"num_heads": (8, 2)},
    "a window that doesn't divide": {"window_size": 3},
    "a window larger than the last map": {"window_size": 7},
    "odd maps, one side longer": {"image_size": (44, 70), "window_size": (3, 4)},
}

every_odd_model = pytest.mark.parametrize("fields", ODD.values(), ids=ODD.keys())


def config(variant: str = "tiny", **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({"variant": variant, **fields})


def counted_parameters(variant: str, **fields: object) -> int:
    with torch.device("meta"):
        model = create_model(f"swinv2_{variant}", **fields)
    return sum(parameter.numel() for parameter in model.parameters())


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [0, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameters_of_every_variant_are_those_of_the_model_that_is_built(variant, num_classes):
    counted = counted_parameters(variant, num_classes=num_classes)
    assert num_parameters(config(variant, num_classes=num_classes)) == counted


@every_odd_model
def test_the_parameters_of_an_odd_model_are_those_of_the_model_that_is_built(fields):
    assert num_parameters(config(**{**SMALL, **fields})) == counted_parameters("tiny", **{**SMALL, **fields})


def test_giant_has_the_three_billion_parameters_of_the_paper():
    assert num_parameters(config("giant")) == 2_997_843_680


# --- multiply-adds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "image", "window"), README, ids=str)
def test_multiply_adds_are_those_of_the_released_readme(variant, image, window):
    work = num_multiply_adds(config(variant, image_size=image, window_size=window, num_classes=1000))
    assert round(work / 1e9, 1) == README[variant, image, window]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("image", "window"), [(192, 12), (256, 8), (384, 24), (640, 40)])
def test_multiply_adds_are_microsofts_formula_wherever_windows_divide_maps(variant, image, window):
    # flops() of models/swin_transformer_v2.py, summed over a stage. It has no extra norms, and divides the first map's
    # tokens by 16 where the last map has a 64th of them: both are accounted for, nothing else differs.
    model = config(variant, image_size=image, window_size=window, num_classes=1000)
    side, last = image // 4, 8 * model.embed_dim
    expected = side**2 * model.embed_dim * (3 * 16 + 1) + last * side**2 // 16 + last * 1000
    extra_norms = 0
    for stage, depth in enumerate(model.depths):
        dim, length = model.embed_dim * 2**stage, side // 2**stage
        n = min(window, length) ** 2
        attention = n * dim * 3 * dim + 2 * n * dim * n + n * dim * dim
        expected += depth * (length**2 // n * attention + 2 * length**2 * dim * dim * 4 + 2 * length**2 * dim)
        if stage < 3:
            expected += (length // 2) ** 2 * 8 * dim * dim + length**2 * dim // 2
        extra_norms += sum(model.has_extra_norm(stage, block) for block in range(depth)) * length**2 * dim
    assert num_multiply_adds(model) == expected + extra_norms - last * side**2 * 3 // 64


def test_a_map_that_the_window_does_not_divide_is_not_padded():
    # 1536 px, window 32: only the last map, 48x48, isn't divided. Padded to 64x64 its attention layers would do
    # (64**2 - 48**2) tokens more in qkv and projection, and 4 x 1024**2 pairs: 26,137 G.
    model = config("giant", image_size=1536, window_size=32)
    dim, blocks = 4096, 4
    pairs = attention_pairs((48, 48), (32, 32), False)
    assert pairs == (32**2 + 16**2) ** 2
    padding = blocks * (4 * dim * dim * (64**2 - 48**2) + 2 * dim * (4 * 1024**2 - pairs))
    assert round(num_multiply_adds(model) / 1e9) == 25572
    assert round((num_multiply_adds(model) + padding) / 1e9) == 26137


def test_a_long_image_costs_as_much_as_the_two_squares_it_is_made_of():
    # A 2:1 image is two square ones side by side, where windows divide both.
    square = config(image_size=128, window_size=4, num_classes=0)
    wide = config(image_size=(128, 256), window_size=4, num_classes=0)
    tall = config(image_size=(256, 128), window_size=4, num_classes=0)
    assert num_multiply_adds(wide) == num_multiply_adds(tall) == 2 * num_multiply_adds(square)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("map_size", "window"), [((8, 8), (4, 4)), ((7, 12), (3, 5)), ((6, 9), (12, 4)), ((4, 4), (4, 4)), ((5,), (2,))]
)
def test_attention_pairs_are_those_of_the_tiles_that_attention_really_uses(map_size, window, shifted):
    groups = tiling(map_size, window, shifted, torch.device("cpu")).groups
    expected = sum(group.num_tiles * group.num_tokens**2 for group in groups)
    assert attention_pairs(map_size, window, shifted) == expected


def test_only_shifted_blocks_that_cut_windows_cost_less_than_is_published():
    shifted = config(**SMALL)
    assert num_multiply_adds(shifted, as_published=False) < num_multiply_adds(shifted)
    for fields in ({"depths": (1, 1)}, {"window_size": 8}):
        # No second block; or a second block on maps of 8x8 and 4x4, which one window holds whole.
        unshifted = config(**{**SMALL, **fields})
        assert num_multiply_adds(unshifted, as_published=False) == num_multiply_adds(unshifted)


@every_odd_model
def test_what_is_counted_is_what_torch_multiplies(fields):
    """torch counts two for every multiply-add of matrix products and convolutions, and nothing for LayerNorms.

    It also counts the MLP of the position bias, which our number leaves out. What LayerNorms return is read off the
    running model. Nothing else may differ.
    """
    fields = {**SMALL, **fields}
    model = create_model("swinv2_tiny", **fields).eval()
    norm_numbers = []

    def count_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norm_numbers.append(output.numel())

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(count_norm)
    of_biases = 0
    for window, heads, depth in zip(
        model.config.stage_windows, model.config.num_heads, model.config.depths, strict=True
    ):
        of_biases += depth * math.prod(2 * side - 1 for side in window) * 512 * (len(window) + heads)
    image = torch.zeros(1, model.config.in_channels, *model.config.image_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    products = counter.get_total_flops() // 2 - of_biases
    assert num_multiply_adds(model.config, as_published=False) == products + sum(norm_numbers)


def test_a_batch_costs_its_images_times_as_much_but_one_position_bias():
    model = create_model("swinv2_tiny", **SMALL).eval()
    counts = []
    for batch in (1, 3):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch, 3, 32, 32))
        counts.append(counter.get_total_flops() // 2)
    maps = [math.prod(size) for size in model.config.stage_maps]
    norms = maps[0] * 16 * (1 + 2 * 2) + maps[1] * 32 * (1 + 2 * 3 + 1)
    assert (counts[1] - counts[0]) / 2 == num_multiply_adds(model.config, as_published=False) - norms
