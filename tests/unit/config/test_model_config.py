"""ModelConfig: the table of variants, and the numbers that follow from it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swinv2_scale.config.model import VARIANTS, ModelConfig

#: Swin V2 (arXiv 2111.09883) sec. 3.6 and appendix: channels of the first stage, and layers of each.
PUBLISHED = {
    "tiny": (96, (2, 2, 6, 2)),
    "small": (96, (2, 2, 18, 2)),
    "base": (128, (2, 2, 18, 2)),
    "large": (192, (2, 2, 18, 2)),
    "huge": (352, (2, 2, 18, 2)),
    "1b": (448, (2, 2, 18, 2)),  # Microsoft's model hub gives 1.06 billion parameters and no width
    "giant": (512, (2, 2, 42, 4)),
}

# The machines that run this are shared: no example may fail for being slow.
thorough = settings(deadline=None, max_examples=100, database=None)


def model(**fields) -> ModelConfig:
    return ModelConfig.model_validate(fields)


def test_the_variants_are_the_published_ones():
    assert {name: (v["embed_dim"], v["depths"]) for name, v in VARIANTS.items()} == PUBLISHED


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_variant_is_valid_with_heads_of_32_channels(variant):
    config = model(variant=variant)
    assert [dim / heads for dim, heads in zip(config.stage_dims, config.num_heads, strict=True)] == [32.0] * 4


@pytest.mark.parametrize("variant", PUBLISHED)
def test_only_huge_and_giant_have_norms_on_the_main_branch(variant):
    assert model(variant=variant).extra_norm_every == (6 if variant in ("huge", "giant") else 0)


def test_the_model_is_tiny_where_nothing_is_said():
    assert model() == model(variant="tiny")


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_field_of_a_variant_can_be_given(variant):
    config = model(variant=variant, embed_dim=64, num_heads=(2, 4, 8, 16), extra_norm_every=3)
    assert (config.embed_dim, config.num_heads, config.extra_norm_every) == (64, (2, 4, 8, 16), 3)
    assert config.depths == PUBLISHED[variant][1]


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1},
        {"attention": {"unknown": 1}},
        {"embed_dim": "96"},
        {"embed_dim": 96.0},
        {"embed_dim": True},
        {"embed_dim": 0},
        {"depths": ()},
        {"depths": (2, 0)},
        {"drop_path_rate": 1.0},
        {"drop_path_rate": -0.1},
        {"num_classes": -1},
        {"image_size": (192, 192, 192)},
        {"attention": {"backend": "fast"}},
        {"attention": {"max_score_bytes": 0}},
    ],
)
def test_what_is_no_model_is_refused(fields):
    with pytest.raises(ValidationError):
        model(**fields)


def test_a_model_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        model().embed_dim = 1


def test_one_size_counts_for_both_axes():
    config = model(image_size=192, window_size=12)
    assert (config.image_shape, config.window_shape) == ((192, 192), (12, 12))


def test_two_sizes_are_height_and_width():
    config = model(image_size=(192, 384), window_size=(6, 12))
    assert (config.image_shape, config.window_shape) == ((192, 384), (6, 12))
    assert config.stage_maps == ((48, 96), (24, 48), (12, 24), (6, 12))


def test_the_pre_training_maps_are_those_of_the_paper():
    # Sec. 4: 192x192 images, patches of 4: 48x48 tokens and half at each of three mergings.
    config = model(variant="giant", image_size=192)
    assert config.stage_maps == ((48, 48), (24, 24), (12, 12), (6, 6))
    assert config.stride == 32
    assert config.stage_dims == (512, 1024, 2048, 4096)


@given(
    image=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    patch=st.integers(1, 16),
    depths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
)
@thorough
def test_every_stage_sees_one_token_for_each_stride_begun(image, patch, depths):
    config = model(image_size=image, patch_size=patch, depths=tuple(depths), num_heads=(1,) * len(depths))
    assert config.num_stages == len(depths)
    assert config.stride == patch * 2 ** (len(depths) - 1)
    for stage, size in enumerate(config.stage_maps):
        # Rounding up once or at every halving is the same: ceil(ceil(n / a) / b) == ceil(n / (a * b)).
        assert size == tuple(math.ceil(length / (patch * 2**stage)) for length in image)
        assert config.stage_dims[stage] == config.embed_dim * 2**stage


@given(rate=st.floats(0, 0.99), depths=st.lists(st.integers(1, 20), min_size=1, max_size=4))
@thorough
def test_drop_path_rises_linearly_from_nothing_over_all_blocks(rate, depths):
    config = model(depths=tuple(depths), num_heads=(1,) * len(depths), drop_path_rate=rate)
    rates = config.drop_path_rates
    # linspace multiplies by a rounded step, we divide last: two roundings each, of 2**-53; the absolute part is for
    # rates below 1e-300, which have fewer digits.
    np.testing.assert_allclose(rates, np.linspace(0, rate, sum(depths)), rtol=4 * 2**-53, atol=1e-300)
    assert len(rates) == sum(depths)
    assert rates[0] == 0.0
    assert list(rates) == sorted(rates)


def test_a_single_block_drops_nothing():
    assert model(depths=(1,), num_heads=(3,), drop_path_rate=0.5).drop_path_rates == (0.0,)


def test_one_backend_counts_for_all_stages():
    config = model(attention={"backend": "sequential"})
    assert config.stage_backends == ("sequential",) * 4


def test_each_stage_can_have_its_own_backend():
    names = ("sequential", "sequential", "eager", "eager")
    assert model(attention={"backend": names}).stage_backends == names


def test_a_first_pre_training_counts_with_the_windows_that_it_really_uses():
    assert model(image_size=192, window_size=12).stage_pretrained_windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    narrow = model(image_size=(64, 128), window_size=8)
    assert narrow.stage_pretrained_windows == ((8, 8), (8, 8), (4, 8), (2, 4))


def test_settled_windows_are_spelled_out_and_inherited_word_for_word():
    first = model(image_size=192, window_size=12).settled
    assert first.pretrained_window_sizes == (12, 12, 12, 6)
    for image, window in ((256, 16), (384, 24), (640, 40), (1536, 32), (1536, 48)):
        later = model(image_size=image, window_size=window, pretrained_window_sizes=first.pretrained_window_sizes)
        assert later.settled == later
        assert later.stage_pretrained_windows == ((12, 12), (12, 12), (12, 12), (6, 6))
    narrow = model(image_size=(64, 128), window_size=8).settled
    assert narrow.pretrained_window_sizes == (8, 8, (4, 8), (2, 4))
    assert model(pretrained_window_sizes=(0, 7, 0, 0), image_size=192).settled.pretrained_window_sizes == (12, 7, 12, 6)


def test_extra_norms_are_counted_in_each_stage_or_through_the_model():
    giant = model(variant="giant")
    places = [(s, b) for s, depth in enumerate(giant.depths) for b in range(depth) if giant.has_extra_norm(s, b)]
    assert places == [(2, b) for b in (5, 11, 17, 23, 29, 35, 41)]
    other = model(variant="giant", extra_norm_counter="model")
    places = [(s, b) for s, depth in enumerate(other.depths) for b in range(depth) if other.has_extra_norm(s, b)]
    assert places == [*((2, b) for b in (1, 7, 13, 19, 25, 31, 37)), (3, 1)]


def test_the_windows_of_an_earlier_pre_training_are_kept_for_each_stage():
    config = model(pretrained_window_sizes=(12, 12, 12, 6))
    assert config.stage_pretrained_windows == ((12, 12), (12, 12), (12, 12), (6, 6))
