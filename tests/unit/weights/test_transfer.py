"""Weights for a model that differs where it may: image sizes, windows, channels, classes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swinv2_scale.errors import WeightsError
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.weights.api import load_weights, save_weights
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.read import open_weights
from swinv2_scale.weights.transfer import adapt_channels
from tests.unit.weights.small import (
    FOUR_STAGES,
    assert_same_bits,
    classifier,
    microsoft_buffers,
    named,
    other_values,
    pictures,
    save_pickle,
    save_state,
    simmim,
    state,
    yacs_config,
)

torch.set_num_threads(1)

FIRST_WINDOWS = (12, 12, 12, 6)
#: The paper's stages: pre-training, classification, ADE20K, COCO, and COCO tested with a larger window.
STAGES = ((192, 12), (256, 16), (384, 24), (640, 40), (1536, 32), (1536, 48))


def bias_tables(model: SwinV2) -> list[Tensor]:
    """(heads, 2w-1, 2w-1) of the first block of each stage, for the window really used there."""
    with torch.no_grad():
        return [
            stage.blocks[0].attn.cpb_mlp.table(window, torch.device("cpu"))  # type: ignore[union-attr, index, operator]
            for stage, window in zip(model.layers, model.config.stage_windows, strict=True)
        ]


def middle(table: Tensor, reach: int) -> Tensor:
    """The entries whose offsets are at most ``reach`` along both axes."""
    centre = table.shape[1] // 2
    return table[:, centre - reach : centre + reach + 1, centre - reach : centre + reach + 1]


# --- image sizes and windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["native", "hf"])
def test_the_windows_of_the_first_pretraining_are_inherited_through_every_later_stage(
    style: Any, tmp_path: Path
) -> None:
    models = [classifier(**FOUR_STAGES, image_size=size, window_size=window) for size, window in STAGES]
    for number, (before, after) in enumerate(pairwise(models)):
        # Hugging Face's code can't run 1536 px with windows of 32 (a last map of 48): our file is used there.
        is_theirs = style == "hf" and before.config.image_size != 1536
        path = tmp_path / (f"stage{number}" if is_theirs else f"stage{number}.safetensors")
        save_weights(before, path, "hf" if is_theirs else "native")
        report = load_weights(other_values(after), path)
        assert report.pretrained_window_sizes == FIRST_WINDOWS
        assert report.warnings == ()
        assert after.config.stage_pretrained_windows == tuple((window, window) for window in FIRST_WINDOWS)
        assert_same_bits(after, models[0])
    assert models[0].config.pretrained_window_sizes is None
    assert models[-1].config.stage_windows == ((48, 48),) * 4


@pytest.mark.parametrize(("size", "window"), STAGES[1:])
def test_equal_offsets_keep_equal_biases_at_any_size_and_window(size: int, window: int, tmp_path: Path) -> None:
    """To the bit: the same float32 offsets go through the same multiplications."""
    first = classifier(**FOUR_STAGES, image_size=192, window_size=12)
    save_weights(first, tmp_path / "x.safetensors")
    later = classifier(**FOUR_STAGES, image_size=size, window_size=window)
    load_weights(later, tmp_path / "x.safetensors")
    for before, after in zip(bias_tables(first), bias_tables(later), strict=True):
        reach = min(before.shape[1], after.shape[1]) // 2
        assert reach > 0
        # A matrix product may sum its 512 terms in another order where it has other rows: 512 roundings of float32.
        torch.testing.assert_close(middle(after, reach), middle(before, reach), rtol=512 * 2**-24, atol=0)


def test_a_model_with_windows_of_its_own_would_read_the_bias_at_another_scale(tmp_path: Path) -> None:
    """What inheriting is for: without it the same weights give other biases at the same offsets."""
    first = classifier(**FOUR_STAGES, image_size=192, window_size=12)
    save_weights(first, tmp_path / "x.safetensors")
    fields = {**FOUR_STAGES, "image_size": 384, "window_size": 24}
    stubborn = classifier(**fields, pretrained_window_sizes=(24, 24, 24, 12))
    report = load_weights(stubborn, tmp_path / "x.safetensors")
    assert report.pretrained_window_sizes == (24, 24, 24, 12)
    (warning,) = report.warnings
    assert "[24, 24, 24, 12]" in warning
    assert "[12, 12, 12, 6]" in warning
    assert not torch.allclose(middle(bias_tables(stubborn)[0], 11), bias_tables(first)[0], rtol=1e-3)


def test_windows_that_are_given_as_the_file_has_them_are_no_reason_to_warn(tmp_path: Path) -> None:
    save_weights(classifier(**FOUR_STAGES, image_size=192, window_size=12), tmp_path / "x.safetensors")
    fields = {**FOUR_STAGES, "image_size": 384, "window_size": 24}
    report = load_weights(classifier(**fields, pretrained_window_sizes=FIRST_WINDOWS), tmp_path / "x.safetensors")
    assert report.warnings == ()


def test_weights_loaded_over_other_weights_bring_their_own_windows(tmp_path: Path) -> None:
    """Nobody spelled windows out here: the first file's belong to the first file's weights, which are gone."""
    save_weights(classifier(), tmp_path / "w4.safetensors")
    save_weights(classifier(image_size=64, window_size=8), tmp_path / "w8.safetensors")
    model = classifier(image_size=128, window_size=16)
    assert load_weights(model, tmp_path / "w4.safetensors").pretrained_window_sizes == (4, 4)
    second = load_weights(model, tmp_path / "w8.safetensors")
    assert second.pretrained_window_sizes == (8, 8)
    assert second.warnings == ()


def test_a_pretrained_backbone_goes_into_a_classifier_of_another_size_with_its_windows(tmp_path: Path) -> None:
    save_weights(simmim(), tmp_path / "pretrained.pth", "microsoft")
    model = classifier(image_size=96, window_size=12)
    assert load_weights(model, tmp_path / "pretrained.pth").pretrained_window_sizes == (4, 4)
    assert torch.isfinite(model(pictures(size=96))).all()


def test_a_model_keeps_its_windows_when_pretraining_goes_on_at_another_size(tmp_path: Path) -> None:
    save_weights(simmim(), tmp_path / "first.safetensors")
    later = simmim(image_size=64, window_size=8)
    load_weights(later, tmp_path / "first.safetensors")
    assert later.encoder.config.pretrained_window_sizes == (4, 4)
    save_weights(later, tmp_path / "second.safetensors")
    assert open_weights(tmp_path / "second.safetensors").config().pretrained_window_sizes == (4, 4)


@pytest.mark.parametrize("style", ["native", "timm"])
def test_windows_and_images_that_are_not_square_are_kept(style: Any, tmp_path: Path) -> None:
    fields = {"image_size": (64, 32), "window_size": (8, 4)}
    save_weights(classifier(**fields), tmp_path / "x.safetensors", style)
    model = classifier(image_size=(96, 96), window_size=12)
    report = load_weights(model, tmp_path / "x.safetensors")
    assert report.pretrained_window_sizes == ((8, 4), (8, 4))
    assert model.config.stage_pretrained_windows == ((8, 4), (8, 4))
    again = classifier(**fields)
    load_weights(again, tmp_path / "x.safetensors")
    x = pictures(size=(64, 32))
    assert torch.equal(again(x), classifier(**fields)(x))


def test_torchvisions_tables_say_windows_that_are_not_square(tmp_path: Path) -> None:
    save_weights(classifier(image_size=(64, 32), window_size=(4, 2)), tmp_path / "x.pth", "torchvision")
    assert load_weights(classifier(), tmp_path / "x.pth").pretrained_window_sizes == ((4, 2), (4, 2))


def test_a_file_that_says_no_windows_gets_the_models_own_and_a_warning(tmp_path: Path) -> None:
    path = save_state(classifier(), tmp_path / "bare.pth")
    report = load_weights(classifier(image_size=64, window_size=8), path)
    assert report.pretrained_window_sizes == (8, 8)
    (warning,) = report.warnings
    assert "pretrained_window_sizes" in warning
    assert warning in str(report)


# --- what Microsoft's files say ---------------------------------------------------------------------------------------

GEOMETRIES = [
    pytest.param(192, 12, (0, 0, 0, 0), FIRST_WINDOWS, id="192/12"),
    pytest.param(224, 14, FIRST_WINDOWS, FIRST_WINDOWS, id="224/14 from 192/12"),
    pytest.param(256, 16, FIRST_WINDOWS, FIRST_WINDOWS, id="256/16 from 192/12"),
    pytest.param(384, 24, FIRST_WINDOWS, FIRST_WINDOWS, id="384/24 from 192/12"),
    pytest.param(256, 8, (0, 0, 0, 0), (8, 8, 8, 8), id="256/8"),
    pytest.param(640, 40, FIRST_WINDOWS, FIRST_WINDOWS, id="640/40 from 192/12"),
]


@pytest.mark.parametrize(("size", "window", "pretrained", "expected"), GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_windows_and_image_size_are_read_from_the_tables_in_microsofts_files(
    size: int, window: int, pretrained: Any, expected: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Float16, too: ``model.half()`` casts buffers, and a relative error of 2**-11 is far from half a token."""
    fields = {**FOUR_STAGES, "depths": (2, 1, 1, 1)}
    model = classifier(**fields, image_size=size, window_size=window)
    buffers = microsoft_buffers(size, window, pretrained, fields["depths"], dtype)
    path = save_pickle({"model": {**state(model.to(dtype)), **buffers}}, tmp_path / "x.pth")
    found = open_weights(path).config()
    assert (found.image_size, found.window_size, found.pretrained_window_sizes) == (size, window, expected)
    report = load_weights(classifier(**fields, image_size=96, window_size=24), path)
    assert report.pretrained_window_sizes == expected
    assert report.warnings == ()
    assert {*report.dropped} == {*buffers}


@pytest.mark.parametrize(("size", "window", "pretrained", "expected"), GEOMETRIES)
def test_windows_and_image_size_are_read_from_the_configuration_in_microsofts_files(
    size: int, window: int, pretrained: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(**FOUR_STAGES, image_size=size, window_size=window)
    config = yacs_config(monkeypatch, size, window, pretrained)
    path = save_pickle({"model": state(model), "config": config, "epoch": 1, "max_accuracy": 81.5}, tmp_path / "x.pth")
    found = open_weights(path)
    assert found.style == "microsoft"
    config = found.config()
    assert (config.image_size, config.window_size, config.pretrained_window_sizes) == (size, window, expected)


def test_microsofts_pretraining_checkpoint_is_read_with_its_prefix_buffers_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = simmim(depths=(2, 2))
    buffers = microsoft_buffers(32, 4, (0, 0), (2, 2))
    tensors = {**state(model), **{f"encoder.{name}": value for name, value in buffers.items()}}
    config = yacs_config(monkeypatch, 32, 4, (0, 0))
    path = save_pickle({"model": tensors, "config": config, "optimizer": {}, "scaler": {}}, tmp_path / "x.pth")
    loaded = simmim(depths=(2, 2))
    report = load_weights(other_values(loaded), path)
    assert_same_bits(loaded, model)
    assert report.pretrained_window_sizes == (4, 4)
    assert len(report.dropped) == len(buffers)


def test_the_size_of_an_image_is_not_guessed_where_no_block_could_have_a_mask(tmp_path: Path) -> None:
    """Stages of one block are never shifted, so a missing mask says nothing about how many windows there are."""
    tensors = {**state(classifier(depths=(1, 1))), **microsoft_buffers(64, 4, (0, 0), (1, 1))}
    found = open_weights(save_pickle(tensors, tmp_path / "x.pth")).model_fields
    assert found["window_size"] == 4
    assert found.get("image_size") in (None, 64)


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 13])
@pytest.mark.parametrize("style", ["hf", "microsoft"])
def test_rgb_weights_are_taken_for_other_channels_by_a_rule_that_the_report_states(
    style: Any, channels: int, tmp_path: Path
) -> None:
    save_weights(classifier(), tmp_path / named("rgb", style), style)
    model = other_values(classifier(in_channels=channels))
    report = load_weights(model, tmp_path / named("rgb", style))
    assert set(report.derived) == {"patch_embed.proj.weight"}
    assert f"3 channels to {channels}" in str(report)
    found, rgb = state(model), state(classifier())
    expected = (
        sum(rgb["patch_embed.proj.weight"][:, i : i + 1] for i in range(3))
        if channels == 1
        else torch.stack([rgb["patch_embed.proj.weight"][:, i % 3] * 3 / channels for i in range(channels)], 1)
    )
    # One rounding of float32 for the factor, two for the sums.
    torch.testing.assert_close(found.pop("patch_embed.proj.weight"), expected, rtol=0, atol=4 * 2**-24)
    assert all(torch.equal(value, rgb[name]) for name, value in found.items())


def test_a_grey_picture_gives_a_one_channel_model_the_same_logits(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "rgb.pth", "microsoft")
    grey = classifier(in_channels=1)
    load_weights(grey, tmp_path / "rgb.pth")
    x = pictures(1)
    # Sums of 48 products in another order, in float32, of numbers about one.
    torch.testing.assert_close(grey(x), classifier()(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_three_times_as_many_equal_channels_give_the_same_tokens() -> None:
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, weight, stride=4)
    found = torch.nn.functional.conv2d(x.repeat(1, 3, 1, 1), adapt_channels(weight, 9), stride=4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, 144 terms


@pytest.mark.parametrize(("of_the_file", "of_the_model"), [(1, 3), (4, 3), (4, 5), (13, 1)])
def test_only_rgb_is_taken_for_other_channels(of_the_file: int, of_the_model: int, tmp_path: Path) -> None:
    save_weights(classifier(in_channels=of_the_file), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight"):
        load_weights(classifier(in_channels=of_the_model), tmp_path / "x.safetensors")


@pytest.mark.parametrize("channels", [1, 4, 5, 13])
def test_other_channels_come_back_bit_for_bit_from_every_format(channels: int, tmp_path: Path) -> None:
    model = classifier(in_channels=channels)
    for style in ("native", "hf", "timm", "microsoft", "torchvision"):
        save_weights(model, tmp_path / named(style, style), style)  # type: ignore[arg-type]
        loaded = classifier(in_channels=channels)
        load_weights(other_values(loaded), tmp_path / named(style, style))
        assert_same_bits(loaded, model)


def test_a_pretrained_model_of_other_channels_starts_a_new_pixel_head(tmp_path: Path) -> None:
    save_weights(simmim(), tmp_path / "rgb.safetensors")
    model = simmim(in_channels=4)
    before = state(model)
    report = load_weights(model, tmp_path / "rgb.safetensors")
    assert set(report.new) == {"decoder.0.weight", "decoder.0.bias"}
    assert set(report.derived) == {"encoder.patch_embed.proj.weight"}
    assert torch.equal(state(model)["decoder.0.weight"], before["decoder.0.weight"])


# --- class heads ------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, **fields: Any) -> Path:
    save_weights(classifier(**fields), tmp_path / "x.pth", "microsoft")
    return tmp_path / "x.pth"


def test_a_head_of_the_same_classes_is_kept(tmp_path: Path) -> None:
    loaded = classifier()
    report = load_weights(other_values(loaded), saved(tmp_path))
    assert {"head.weight", "head.bias"} <= set(report.loaded)
    assert_same_bits(loaded, classifier())


def test_a_head_of_other_classes_starts_anew_and_the_report_says_both_numbers(tmp_path: Path) -> None:
    model = classifier(num_classes=7)
    before = state(model)
    report = load_weights(model, saved(tmp_path))
    assert set(report.new) == {"head.weight", "head.bias"}
    assert "the file's head has 5 classes, the model's 7" in str(report)
    assert torch.equal(state(model)["head.weight"], before["head.weight"])


def test_a_new_head_can_be_asked_for(tmp_path: Path) -> None:
    model = other_values(classifier())
    before = state(model)
    report = load_weights(model, saved(tmp_path), head="new")
    assert set(report.new) == {"head.weight", "head.bias"}
    assert torch.equal(state(model)["head.bias"], before["head.bias"])
    assert "new head was asked for" in str(report)


def test_keeping_the_head_is_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has a head of 5 classes, the model a head of 7"):
        load_weights(classifier(num_classes=7), saved(tmp_path), head="keep")


def test_keeping_a_head_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="head"):
        load_weights(classifier(), saved(tmp_path, num_classes=0), head="keep")


def test_a_model_without_a_head_drops_the_files_and_says_so(tmp_path: Path) -> None:
    report = load_weights(classifier(num_classes=0), saved(tmp_path))
    assert set(report.dropped) == {"head.weight", "head.bias"}


def test_a_map_picks_the_rows_of_the_old_head(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("4\n0\n4\n")
    model = classifier(num_classes=3)
    report = load_weights(model, saved(tmp_path), head_map=tmp_path / "map.txt")
    assert set(report.derived) == {"head.weight", "head.bias"}
    old = state(classifier())
    assert torch.equal(state(model)["head.weight"], old["head.weight"][[4, 0, 4]])
    assert torch.equal(state(model)["head.bias"], old["head.bias"][[4, 0, 4]])
    assert "map.txt" in str(report)


def test_22k_classes_become_1k_by_a_file_and_keep_their_logits(tmp_path: Path) -> None:
    rows = [(number * 7919) % 21841 for number in range(1000)]
    (tmp_path / "map22kto1k.txt").write_text("\n".join(map(str, rows)) + "\n")
    model = classifier(num_classes=1000)
    load_weights(model, saved(tmp_path, num_classes=21841), head_map=str(tmp_path / "map22kto1k.txt"))
    wide = classifier(num_classes=21841)
    # A product of another number of columns may be summed in another order: 24 terms about one in float32.
    torch.testing.assert_close(model(pictures()), wide(pictures())[:, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0\n1\n", "2 lines.*3 classes"),
        ("0\n1\n2\n3\n", "4 lines.*3 classes"),
        ("0\n1\n5\n", r"class 5.*0\.\.4"),
        ("0\n-1\n2\n", r"class -1.*0\.\.4"),
        ("0\none\n2\n", "one"),
        ("0\n1.5\n2\n", r"1\.5"),
        ("", "0 lines"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_before_anything_is_loaded(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text(text)
    model = classifier(num_classes=3)
    before = state(model)
    with pytest.raises(WeightsError, match=reason):
        load_weights(model, saved(tmp_path), head_map=tmp_path / "map.txt")
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_map_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe\x00\x01")
    path = saved(tmp_path)
    for name in ("map.txt", "nowhere.txt"):
        with pytest.raises(WeightsError, match=name):
            load_weights(classifier(num_classes=3), path, head_map=tmp_path / name)


@pytest.mark.parametrize(
    ("of_the_file", "of_the_model", "head"),
    [(0, 3, "auto"), (5, 0, "auto"), (5, 3, "new")],
    ids=["no head in the file", "no head in the model", "a new head was asked for"],
)
def test_a_map_that_cannot_be_used_is_refused_instead_of_ignored(
    of_the_file: int, of_the_model: int, head: Any, tmp_path: Path
) -> None:
    (tmp_path / "map.txt").write_text("0\n1\n2\n")
    path = saved(tmp_path, num_classes=of_the_file)
    with pytest.raises(WeightsError, match="map"):
        load_weights(classifier(num_classes=of_the_model), path, head=head, head_map=tmp_path / "map.txt")


# --- the norms on the main branch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter", ["stage", "model"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_norms_on_the_main_branch_are_kept_in_our_format_however_they_are_counted(
    counter: Any, suffix: str, tmp_path: Path
) -> None:
    fields = {"depths": (2, 4), "extra_norm_every": 3, "extra_norm_counter": counter}
    model = classifier(**fields)
    norms = [name for name in state(model) if ".norm3." in name]
    assert norms
    save_weights(model, tmp_path / f"x{suffix}")
    found = open_weights(tmp_path / f"x{suffix}").config(image_size=32, window_size=4)
    places = [(i, j) for i, depth in enumerate((2, 4)) for j in range(depth)]
    assert [p for p in places if found.has_extra_norm(*p)] == [p for p in places if model.config.has_extra_norm(*p)]
    loaded = classifier(**fields)
    report = load_weights(other_values(loaded), tmp_path / f"x{suffix}")
    assert set(norms) <= set(report.loaded)
    assert_same_bits(loaded, model)


def test_a_model_that_counts_its_norms_otherwise_is_another_model(tmp_path: Path) -> None:
    fields = {"depths": (2, 4), "extra_norm_every": 3}
    save_weights(classifier(**fields, extra_norm_counter="stage"), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"norm3.*in the file, not in the model") as refusal:
        load_weights(classifier(**fields, extra_norm_counter="model"), tmp_path / "x.safetensors")
    assert "extra_norm_every 3" in str(refusal.value)


def test_norms_in_places_that_no_counting_gives_are_refused(tmp_path: Path) -> None:
    tensors = state(classifier(depths=(2, 4), extra_norm_every=1))
    kept = {n: t for n, t in tensors.items() if ".norm3." not in n or "layers.1.blocks.0" in n or "blocks.1" in n}
    path = save_pickle(kept, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="norm3"):
        load_weights(classifier(depths=(2, 4), extra_norm_every=1), path)


@pytest.mark.parametrize("style", ["hf", "timm", "microsoft", "torchvision"])
def test_formats_without_norms_on_the_main_branch_refuse_them_and_say_why(style: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"norm on the main branch.*\n.*native"):
        save_weights(classifier(extra_norm_every=2), tmp_path / named("x", style), style)
    assert list(tmp_path.iterdir()) == []


# --- what else a format can't hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "fields", "reason"),
    [
        ("torchvision", {"pretrained_window_sizes": (8, 8)}, "pre-trained with"),
        ("torchvision", {"window_size": 8}, "pre-trained with"),  # the last map is smaller than the window
        ("hf", {"image_size": (64, 32)}, "square"),
        ("hf", {"window_size": (4, 2)}, "square"),
        ("hf", {"pretrained_window_sizes": ((4, 2), 4)}, "square"),
        ("hf", {"image_size": 40}, "divide"),
        ("hf", {"image_size": 8, "window_size": 2}, "one token"),
        ("microsoft", {"window_size": (4, 2)}, "square"),
        ("microsoft", {"image_size": (64, 32)}, "square"),
        ("microsoft", {"image_size": 40}, "divide"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused_with_the_reason(
    style: Any, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=reason):
        save_weights(classifier(**fields), tmp_path / named("x", style), style)
    assert list(tmp_path.iterdir()) == []


def test_microsofts_pixel_head_predicts_three_channels(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="3 channels"):
        save_weights(simmim(in_channels=4), tmp_path / "x.pth", "microsoft")


def test_a_bare_timm_file_is_accompanied_by_the_windows_that_its_user_must_give(tmp_path: Path) -> None:
    """timm keeps windows in the model's name: left unsaid, another model would come out of the same weights."""
    said = " ".join(save_weights(classifier(pretrained_window_sizes=(6, 3)), tmp_path / "x.pth", "timm"))
    assert "pretrained_window_sizes" in said
    assert "6, 3" in said


# --- mask tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["native", "hf", "microsoft"])
def test_a_mask_token_of_zeros_is_warned_of(style: Any, tmp_path: Path) -> None:
    source = simmim()
    torch.nn.init.zeros_(source.mask_token)
    save_weights(source, tmp_path / named("x", style), style)
    report = load_weights(simmim(), tmp_path / named("x", style))
    assert any("mask token" in warning and "zero" in warning for warning in report.warnings)
    assert "warning: the mask token" in str(report)


def test_a_trained_mask_token_is_no_reason_to_warn(tmp_path: Path) -> None:
    save_weights(simmim(), tmp_path / "x.safetensors")
    assert load_weights(simmim(), tmp_path / "x.safetensors").warnings == ()


def test_a_pretraining_model_starts_its_own_token_where_the_file_has_none(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    model = simmim()
    before = state(model)
    report = load_weights(model, tmp_path / "x.safetensors")
    assert set(report.new) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert torch.equal(state(model)["mask_token"], before["mask_token"])


# --- what timm's names say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swinv2_tiny_window8_256", (256, 8, (8, 8, 8, 8))),
        ("swinv2_tiny_window16_256.ms_in1k", (256, 16, (16, 16, 16, 8))),
        ("swinv2_base_window12_192", (192, 12, FIRST_WINDOWS)),
        ("swinv2_base_window12to16_192to256", (256, 16, FIRST_WINDOWS)),
        ("swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", (384, 24, FIRST_WINDOWS)),
    ],
)
def test_the_windows_that_timms_names_stand_for_are_known(name: str, expected: Any, tmp_path: Path) -> None:
    model = classifier(**FOUR_STAGES, image_size=192, window_size=12)
    save_weights(model, tmp_path / "model.pth", "timm")
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "model.pth").rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text(f'{{"architecture": "{name}", "num_classes": 3}}')
    found = open_weights(folder)
    assert found.style == "timm"
    config = found.config()
    assert (config.image_size, config.window_size, config.pretrained_window_sizes) == expected


def test_windows_that_a_timm_user_chose_win_over_those_of_the_name(tmp_path: Path) -> None:
    """timm's save_for_hf writes what create_model was called with as ``model_args``."""
    save_weights(classifier(**FOUR_STAGES, image_size=192, window_size=12), tmp_path / "model.pth", "timm")
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "model.pth").rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text(
        '{"architecture": "swinv2_tiny_window8_256", "model_args": {"img_size": 192, "window_size": 12}}'
    )
    found = open_weights(folder).config(image_size=192, window_size=12)
    assert found.pretrained_window_sizes == FIRST_WINDOWS


def test_a_checkpoint_of_timms_trainer_is_read(tmp_path: Path) -> None:
    from argparse import Namespace

    save_weights(classifier(), tmp_path / "bare.pth", "timm")
    tensors = torch.load(tmp_path / "bare.pth")
    args = Namespace(model="swinv2_tiny_window8_256", lr=1e-3, opt_betas=None, mean=[0.5, 0.5, 0.5])
    checkpoint = {
        "epoch": 3,
        "arch": "swintransformerv2",
        "state_dict": {f"module.{name}": value for name, value in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "version": 2,
        "args": args,
        "metric": math.pi,
    }
    loaded = classifier()
    assert load_weights(other_values(loaded), save_pickle(checkpoint, tmp_path / "x.pth.tar.pth")).style == "timm"
    assert_same_bits(loaded, classifier())


def test_facts_that_nobody_said_are_imagenets_for_three_channels_and_a_half_otherwise() -> None:
    assert Facts().normalisation(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Facts().normalisation(5) == ((0.5,) * 5, (0.5,) * 5)
    assert Facts(pixel_mean=(0.3,), pixel_std=(0.2,)).normalisation(1) == ((0.3,), (0.2,))


def test_windows_that_a_file_says_cannot_be_given_otherwise(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    source = open_weights(tmp_path / "x.safetensors")
    assert source.config(pretrained_window_sizes=(4, 4)).pretrained_window_sizes == (4, 4)
    with pytest.raises(WeightsError, match=r"pre-trained with windows \[4, 4\], not \(12, 6\)"):
        source.config(pretrained_window_sizes=(12, 6))


def test_two_sets_of_weights_in_one_file_are_refused(tmp_path: Path) -> None:
    both = {**state(classifier()), **{f"module.{name}": value + 1 for name, value in state(classifier()).items()}}
    with pytest.raises(WeightsError, match=r"holds two sets of weights, .* is there twice"):
        load_weights(classifier(), save_pickle(both, tmp_path / "x.pth"))


def test_a_model_without_values_takes_none(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    model = classifier().to("meta")
    with pytest.raises(WeightsError, match=r"meta device.*\n.*to_empty"):
        load_weights(model, tmp_path / "x.safetensors")


def test_a_nan_in_the_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    tensors = state(classifier())
    tensors["norm.bias"] = tensors["norm.bias"].clone()
    tensors["norm.bias"][3] = torch.nan
    model = other_values(classifier())
    before = state(model)
    with pytest.raises(WeightsError, match=r"norm\.bias holds NaN or infinity"):
        load_weights(model, save_pickle(tensors, tmp_path / "x.pth"))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_wrappers_around_a_model_are_looked_through(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    model = other_values(classifier())
    load_weights(torch.nn.DataParallel(model), tmp_path / "x.safetensors")
    assert_same_bits(model, classifier())
    with pytest.raises(WeightsError, match="a Linear is no model of create_model"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")


def test_class_names_and_normalisation_are_kept_by_handing_the_reports_facts_on(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e")
    save_weights(classifier(), tmp_path / "one", "hf", facts=Facts(pixel_mean=(0.1, 0.2, 0.3), labels=names))
    model = classifier()
    report = load_weights(model, tmp_path / "one")
    save_weights(model, tmp_path / "two", "hf", facts=report.facts)
    found = open_weights(tmp_path / "two").facts
    assert (found.labels, found.pixel_mean) == (names, (0.1, 0.2, 0.3))
