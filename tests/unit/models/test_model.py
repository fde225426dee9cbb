"""The backbone: its size, its blocks, its shapes, its first values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.config.model import VARIANTS
from swinv2_scale.errors import ConfigError
from swinv2_scale.models.backbone import PatchEmbed, PatchMerging, SwinV2
from swinv2_scale.models.block import Block
from swinv2_scale.models.factory import create_model, initialise, list_models
from swinv2_scale.models.initialise import initial_values
from swinv2_scale.models.tiles import tiling

torch.set_num_threads(1)

SMALL = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}


def small_model(**fields: object) -> SwinV2:
    return create_model("swinv2_tiny", **{**SMALL, **fields})


def lively(model: nn.Module) -> nn.Module:
    """Random values everywhere: in a fresh model every block is the identity."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread, generator=generator)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(variant: str, **fields: object) -> SwinV2:
    with torch.device("meta"):
        return create_model(f"swinv2_{variant}", **fields)


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "backbone", "with_head"),
    [
        ("tiny", 27.58, 28.35),
        ("small", 48.96, 49.73),
        ("base", 86.89, 87.92),
        ("large", 195.20, 196.74),
        ("huge", 655.21, 658.03),
        ("giant", 2997.82, 3001.91),
    ],
)
def test_parameter_counts_in_millions_are_those_of_the_paper_and_the_released_code(
    variant: str, backbone: float, with_head: float
) -> None:
    extra = sum(p.numel() for name, p in on_meta(variant).named_parameters() if "norm3" in name)
    # shared/facts/model.md 1.1 counts to 0.01 M, without the extra norms, which no public checkpoint has.
    assert round((num_parameters(on_meta(variant)) - extra) / 1e6, 2) == backbone
    assert round((num_parameters(on_meta(variant, num_classes=1000)) - extra) / 1e6, 2) == with_head


def test_parameter_counts_of_tiny_and_giant_are_exact() -> None:
    assert num_parameters(on_meta("tiny", num_classes=1000)) == 28_347_154
    assert num_parameters(on_meta("giant")) == 2_997_815_008 + 28_672
    assert num_parameters(on_meta("giant", num_classes=1000)) == 3_001_940_680


@pytest.mark.parametrize("window", [8, 24])
def test_the_number_of_parameters_does_not_depend_on_window_or_image(window: int) -> None:
    assert num_parameters(on_meta("tiny", window_size=window, image_size=384)) == num_parameters(on_meta("tiny"))


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("giant", [(2, block) for block in (5, 11, 17, 23, 29, 35, 41)]),
        ("huge", [(2, block) for block in (5, 11, 17)]),
        ("large", []),
        ("tiny", []),
    ],
)
def test_extra_norms_follow_every_sixth_block_of_a_stage_in_huge_and_giant_alone(
    variant: str, wanted: list[tuple[int, int]]
) -> None:
    names = [name.split(".") for name, _ in on_meta(variant).named_parameters() if "norm3" in name]
    found = sorted({(int(parts[1]), int(parts[3])) for parts in names})
    assert found == wanted
    assert len(names) == 2 * len(wanted)


def test_an_extra_norm_normalises_the_main_branch_after_the_block() -> None:
    model = small_model(extra_norm_every=2)
    x = images(2, 16, 64)
    block = model.layers[1].blocks[1]
    # A fresh block is the identity, so its extra norm is all that it does; float32 sums of 64 numbers.
    torch.testing.assert_close(block(x, (4, 4)), F.layer_norm(x, (64,)), rtol=1e-6, atol=1e-6)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_a_fresh_block_is_the_identity() -> None:
    model = small_model()
    for stage, dim, map_size in ((0, 32, (8, 8)), (1, 64, (4, 4))):
        for block in model.layers[stage].blocks:
            x = images(2, math.prod(map_size), dim)
            assert torch.equal(block(x, map_size), x)


def test_a_block_adds_the_normalised_attention_and_then_the_normalised_mlp() -> None:
    block = lively(small_model()).double().layers[0].blocks[0]
    x = images(2, 64, 32, dtype=torch.float64)
    tiles = tiling((8, 8), (4, 4), False, x.device)
    attention = block.attn(x, block.attn.cpb_mlp.table((4, 4), x.device), tiles)
    middle = x + F.layer_norm(attention, (32,), block.norm1.weight, block.norm1.bias)
    hidden = middle @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    branch = hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    wanted = middle + F.layer_norm(branch, (32,), block.norm2.weight, block.norm2.bias)
    # Float64 sums of at most 128 terms.
    torch.testing.assert_close(block(x, (8, 8)), wanted, rtol=1e-11, atol=1e-11)


def test_keys_have_no_bias_and_the_logit_scale_stops_at_100() -> None:
    attention = lively(small_model()).double().layers[0].blocks[0].attn
    seen = []

    def spy(qkv: Tensor, scale: Tensor, table: Tensor, tiles: object) -> Tensor:
        seen.append((qkv, scale))
        return qkv[:, :, 2]

    attention.attend = spy
    with torch.no_grad():
        attention.logit_scale.copy_(torch.tensor([10.0, 1.0]).view(2, 1, 1))
        attention(torch.zeros(1, 64, 32, dtype=torch.float64), (8, 8), False)
    qkv, scale = seen[0]
    assert (qkv[:, :, 1] == 0).all()
    assert torch.equal(qkv[0, 0, 0].flatten(), attention.q_bias)
    assert torch.equal(qkv[0, 0, 2].flatten(), attention.v_bias)
    # One exp and one log in float64.
    torch.testing.assert_close(scale, torch.tensor([100.0, math.e], dtype=torch.float64), rtol=1e-12, atol=0)


def test_odd_blocks_of_a_stage_are_shifted_and_even_ones_are_not() -> None:
    model = on_meta("giant")
    for stage in model.layers:
        assert [block.shifted for block in stage.blocks] == [i % 2 == 1 for i in range(len(stage.blocks))]


def test_shifted_blocks_let_a_change_cross_the_border_of_a_window() -> None:
    model = lively(small_model(depths=(2,), num_heads=(2,))).double()
    x = images(1, 3, 32, 32, dtype=torch.float64)
    changed = x.clone()
    changed[..., :4, :4] += 1  # one token, in the window of rows 0-3 and columns 0-3

    def difference(num_blocks: int) -> Tensor:
        outs = []
        for picture in (x, changed):
            tokens, map_size = model.patch_embed(picture)
            for block in model.layers[0].blocks[:num_blocks]:
                tokens = block(tokens, map_size)
            outs.append(tokens)
        return (outs[0] - outs[1]).abs().amax(-1).view(8, 8) > 0

    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True
    assert torch.equal(difference(1), inside)
    inside[:6, :6] = True
    assert torch.equal(difference(2), inside)


# --- patches and merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_size", [(4, 6), (5, 4), (4, 3), (3, 5), (1, 1)])
def test_merging_joins_four_neighbours_column_by_column_then_reduces_then_normalises(
    map_size: tuple[int, int],
) -> None:
    dim = 3
    merging = lively(PatchMerging(dim)).double()
    height, width = map_size
    x = images(2, height * width, dim, dtype=torch.float64)
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    zero = torch.zeros(2, dim, dtype=torch.float64)

    def token(row: int, column: int) -> Tensor:
        return x[:, row * width + column] if row < height and column < width else zero

    wanted = []
    for row, column in itertools.product(range(0, 2 * rows, 2), range(0, 2 * columns, 2)):
        four = [token(row, column), token(row + 1, column), token(row, column + 1), token(row + 1, column + 1)]
        reduced = torch.cat(four, -1) @ merging.reduction.weight.T
        wanted.append(F.layer_norm(reduced, (2 * dim,), merging.norm.weight, merging.norm.bias))
    out, size = merging(x, map_size)
    assert size == (rows, columns)
    # Float64 sums of 12 terms.
    torch.testing.assert_close(out, torch.stack(wanted, 1), rtol=1e-11, atol=1e-11)


def test_patches_are_read_row_by_row_and_missing_pixels_are_zero() -> None:
    embed = lively(PatchEmbed(3, 4, 8)).double()
    x = images(2, 3, 6, 9, dtype=torch.float64)
    padded = torch.zeros(2, 3, 8, 12, dtype=torch.float64)
    padded[..., :6, :9] = x
    patches = [padded[:, :, y : y + 4, z : z + 4].flatten(1) for y in (0, 4) for z in (0, 4, 8)]
    flat = torch.stack(patches, 1) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    tokens, size = embed(x)
    assert size == (2, 3)
    # Float64 sums of 48 terms.
    wanted = F.layer_norm(flat, (8,), embed.norm.weight, embed.norm.bias)
    torch.testing.assert_close(tokens, wanted, rtol=1e-11, atol=1e-11)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "maps"),
    [
        ((32, 32), [(8, 8), (4, 4)]),
        ((32, 48), [(8, 12), (4, 6)]),
        ((20, 36), [(5, 9), (3, 5)]),
        ((4, 64), [(1, 16), (1, 8)]),
        ((30, 33), [(8, 9), (4, 5)]),
    ],
)
def test_the_pyramid_has_one_map_a_stage_for_any_image(size: tuple[int, int], maps: list[tuple[int, int]]) -> None:
    model = lively(small_model(num_classes=7))
    x = images(2, 3, *size)
    levels = model.forward_features_pyramid(x)
    assert [tuple(level.shape) for level in levels] == [(2, 32, *maps[0]), (2, 64, *maps[1])]
    assert all(level.isfinite().all() for level in levels)
    # The pooled features are the mean of the last map: float32 sums of at most 24 numbers.
    torch.testing.assert_close(model.forward_features(x), levels[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert model(x).shape == (2, 7)


def test_only_the_last_level_of_the_pyramid_is_normalised() -> None:
    levels = small_model().forward_features_pyramid(images(2, 3, 32, 32))
    for level, dim in zip(levels, (32, 64), strict=True):
        # Fresh blocks are the identity, so each level is a LayerNorm's output: of the patches, then of the whole.
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), rtol=0, atol=1e-5)
        assert level.shape[1] == dim
    model = lively(small_model())
    first, last = model.forward_features_pyramid(images(2, 3, 32, 32))
    plain = (last - model.norm.bias[:, None, None]) / model.norm.weight[:, None, None]
    # A normalised float32 vector, up to its eps.
    torch.testing.assert_close(plain.std(1, correction=0), torch.ones_like(plain[:, 0]), rtol=1e-3, atol=1e-3)
    assert (first.std(1, correction=0) - 1).abs().max() > 0.1


@pytest.mark.parametrize("window", [(4, 4), (3, 5)])
@pytest.mark.parametrize("size", [(32, 48), (20, 36)])
def test_a_transposed_model_sees_a_transposed_image_alike(size: tuple[int, int], window: tuple[int, int]) -> None:
    model = lively(small_model(depths=(2, 2), window_size=window)).double()
    mirror = small_model(depths=(2, 2), window_size=window[::-1]).double()
    weights = {}
    for name, value in model.state_dict().items():
        if name == "patch_embed.proj.weight":
            value = value.transpose(2, 3)
        elif name.endswith("cpb_mlp.0.weight"):
            value = value.flip(1)  # (dy, dx) -> (dx, dy)
        elif name.endswith("downsample.reduction.weight"):
            value = value.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
        weights[name] = value
    mirror.load_state_dict(weights)
    x = images(2, 3, *size, dtype=torch.float64)
    for ours, theirs in zip(
        model.forward_features_pyramid(x), mirror.forward_features_pyramid(x.transpose(2, 3)), strict=True
    ):
        # Float64 in another order, through four blocks.
        torch.testing.assert_close(ours, theirs.transpose(2, 3), rtol=1e-9, atol=1e-9)


def test_both_attention_backends_make_the_same_model() -> None:
    x = images(2, 3, 36, 28, dtype=torch.float64)
    outs = [
        lively(small_model(attention={"backend": backend, "max_score_bytes": 2000})).double()(x)
        for backend in ("eager", "sequential", ("sequential", "eager"))
    ]
    # Float64 in another order, through three blocks.
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-10, atol=1e-10)


def test_a_model_runs_at_sizes_that_it_was_not_built_for() -> None:
    x = images(1, 3, 40, 40, dtype=torch.float64)
    built = lively(small_model(image_size=40)).double()
    other = lively(small_model(image_size=64)).double()
    assert torch.equal(built(x), other(x))


# --- drop path --------------------------------------------------------------------------------------------------------


def one_branch_block(rate: float) -> Block:
    """A block in which only the attention branch does something; drops with ``rate``."""
    block = lively(small_model(depths=(1, 1), num_heads=(2, 4), drop_path_rate=rate)).double().layers[1].blocks[0]
    with torch.no_grad():
        block.norm2.weight.zero_()
        block.norm2.bias.zero_()
    return block


def test_a_sample_drops_the_same_branches_alone_and_in_any_batch() -> None:
    model = lively(small_model(depths=(2, 4), drop_path_rate=0.5)).double()
    x = images(6, 3, 32, 32, dtype=torch.float64)
    keys = torch.arange(100, 106) * 0x1234_5678_9ABC - 2**50

    def run(which: list[int]) -> Tensor:
        tokens, map_size = model.patch_embed(x[which])
        return model.forward_levels(tokens, map_size, keys[which])[-1][0]

    together = run([0, 1, 2, 3, 4, 5])
    # Only the batch size of float64 matrix products differs.
    for which in ([0], [5], [3, 1], [5, 4, 3, 2, 1, 0]):
        torch.testing.assert_close(run(which), together[which], rtol=1e-10, atol=1e-10)
    swapped = model.forward_levels(*model.patch_embed(x), keys.flip(0))[-1][0]
    assert (swapped - together).abs().max() > 0.1


def test_a_branch_is_dropped_whole_or_kept_and_scaled_up_so_that_the_mean_stays() -> None:
    rate, count = 0.3, 4000
    block = one_branch_block(rate)
    x = images(1, 16, 64, dtype=torch.float64)
    with torch.no_grad():
        branch = block(x, (4, 4)) - x
        moved = torch.cat([block(x.expand(500, -1, -1), (4, 4), k) for k in torch.arange(count).split(500)]) - x
    share = (moved * branch).sum((1, 2)) / branch.square().sum()
    kept = share > 0.5
    # Float64 through one block, in batches of another size; the scale itself is float32.
    torch.testing.assert_close(moved[kept], (branch / (1 - rate)).expand_as(moved[kept]), rtol=1e-5, atol=1e-6)
    assert (moved[~kept] == 0).all()
    # Five standard deviations of a binomial share; the keys are fixed.
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / count))


def test_branches_and_blocks_drop_independently() -> None:
    model = lively(small_model(depths=(1, 4), drop_path_rate=0.5)).double()
    count = 1000
    kept = []
    for block in model.layers[1].blocks[2:]:
        for norm in (block.norm1, block.norm2):
            other = block.norm2 if norm is block.norm1 else block.norm1
            saved = [p.detach().clone() for p in other.parameters()]
            x = torch.ones(1, 1, 64, dtype=torch.float64)
            with torch.no_grad():
                for p in other.parameters():
                    p.zero_()
                kept.append((block(x.expand(count, -1, -1), (1, 1), torch.arange(count)) != x).any(-1).flatten())
                for p, value in zip(other.parameters(), saved, strict=True):
                    p.copy_(value)
    agreement = [(a == b).double().mean().item() for a, b in itertools.combinations(kept, 2)]
    # Rates of the two blocks: 0.375 and 0.5, so independent pairs agree in 50 to 53 % of the samples; the standard
    # deviation of a share of 1000 is 1.6 %.
    assert all(0.42 < share < 0.61 for share in agreement), agreement


def test_drop_rates_rise_linearly_from_zero_to_the_configured_rate() -> None:
    blocks = [block for stage in on_meta("tiny", drop_path_rate=0.3).layers for block in stage.blocks]
    wanted = torch.linspace(0, 0.3, 12).tolist()
    # linspace is float32.
    assert [block.drop_path_rate for block in blocks] == pytest.approx(wanted, abs=1e-7)
    assert [block.index for block in blocks] == list(range(12))


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.5, False), (0.0, False)])
def test_a_rate_of_zero_and_evaluation_drop_nothing(rate: float, training: bool) -> None:
    x = images(4, 3, 32, 32)
    model = lively(small_model(drop_path_rate=rate)).train(training)
    undropped = lively(small_model()).eval()
    assert torch.equal(model(x), undropped(x))
    if rate == 0.0:
        assert torch.equal(
            model.forward_levels(*model.patch_embed(x), torch.arange(4))[-1][0],
            undropped.forward_levels(*undropped.patch_embed(x))[-1][0],
        )


def test_training_with_a_drop_rate_drops_by_torchs_seed() -> None:
    x = images(8, 3, 32, 32)
    model = lively(small_model(drop_path_rate=0.9)).train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- first values -----------------------------------------------------------------------------------------------------


def test_first_values_are_a_function_of_seed_and_name_alone() -> None:
    values = dict(small_model().named_parameters())
    again = dict(small_model().named_parameters())
    other_seed = dict(small_model(seed=1).named_parameters())
    deeper = dict(small_model(depths=(3, 4), num_classes=10).named_parameters())
    random = [name for name, value in values.items() if value.std() > 0]
    assert len(random) > 10
    for name, value in values.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, deeper[name])
    for name in random:
        assert not torch.equal(values[name], other_seed[name])
    same_shape = [values[name].flatten() for name in random if values[name].shape == (128, 64)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(same_shape, 2))


def test_first_values_do_not_depend_on_the_order_they_are_asked_in_or_on_torchs_generator() -> None:
    model = small_model()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    torch.manual_seed(1)
    forward = dict(initial_values(model, shapes, 3))
    torch.manual_seed(2)
    backward = dict(initial_values(model, dict(reversed(shapes.items())), 3))
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    before = torch.get_rng_state()
    initialise(model, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_values_have_the_released_distributions() -> None:
    model = small_model(embed_dim=64, num_heads=(2, 4), extra_norm_every=2, num_classes=10)
    for name, value in model.named_parameters():
        owner = name.split(".")[-2] if "." in name else ""
        if name.endswith("logit_scale"):
            # One float32 rounding of 2.3.
            assert (value - math.log(10)).abs().max() < 1e-6
        elif name.startswith("patch_embed.proj"):
            bound = 1 / math.sqrt(3 * 4 * 4)  # torch's default for a convolution
            assert value.abs().max() <= bound
            assert value.abs().max() > 0.9 * bound
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif "norm" in owner:
            is_residual = owner in ("norm1", "norm2")
            assert (value == (0.0 if is_residual else 1.0)).all(), name
        else:
            # 640 draws or more: a standard deviation is known to 3 %; five times that is allowed.
            assert value.std().item() == pytest.approx(0.02, rel=0.15), name
            assert value.mean().abs() < 0.02 * 5 / math.sqrt(value.numel()), name


def test_a_mask_token_starts_at_random_numbers_of_a_fiftieth() -> None:
    module = nn.Module()
    module.mask_token = nn.Parameter(torch.empty(1, 1, 512))
    ((name, value),) = initial_values(module, {"mask_token": module.mask_token.shape}, 0)
    assert name == "mask_token"
    # 512 draws: a standard deviation is known to 3 %, five times that is allowed.
    assert value.std().item() == pytest.approx(0.02, rel=0.16)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_every_listed_model_can_be_built() -> None:
    assert list_models() == [f"swinv2_{variant}" for variant in VARIANTS]
    for name in list_models():
        with torch.device("meta"):
            assert isinstance(create_model(name), SwinV2)


def test_a_misspelt_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"swinv2_gaint.*did you mean swinv2_giant"):
        create_model("swinv2_gaint")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window": 8}, "window: no such field .did you mean window_size"),
        ({"img_size": 256}, "img_size: no such field .did you mean image_size"),  # timm's words
        ({"in_chans": 1}, "in_chans: no such field .did you mean in_channels"),
        ({"variant": "giant"}, "variant: no such field"),
        ({"embed_dim": "96"}, "embed_dim"),
        ({"window_size": 0}, "window_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"depths": ()}, "depths"),
        ({"attention": {"backend": "flash"}}, "backend"),
        ({"num_heads": (3, 6)}, "num_heads"),  # four stages
        ({"num_heads": (5, 6, 12, 24)}, "num_heads"),  # 96 channels in 5 heads
        ({"pretrained_window_sizes": (12, 12)}, "pretrained_window_sizes"),
        ({"attention": {"backend": ("eager", "eager")}}, "backend"),
        # The map, the window, and what fits: windows and images.
        ({"image_size": 32, "window_size": 12}, r"12 is larger .* map of 8 tokens .* \[1, 2, 4, 8\] .* 48 px or more"),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_its_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        create_model("swinv2_tiny", **fields)
