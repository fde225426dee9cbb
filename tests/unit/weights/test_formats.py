"""Every format and every pair of formats: the same bits come back, and every tensor is accounted for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import swinv2_scale
from swinv2_scale.config.model import ModelConfig
from swinv2_scale.config.tasks import CropRule
from swinv2_scale.errors import WeightsError
from swinv2_scale.weights import write
from swinv2_scale.weights.api import load_weights, save_weights
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.names import FORMAT_NAMES
from swinv2_scale.weights.read import Weights, open_weights
from swinv2_scale.weights.write import write_weights
from tests.unit.weights.small import (
    FORMATS,
    assert_holds_the_classifier,
    assert_same_bits,
    classifier,
    named,
    other_values,
    pictures,
    save_pickle,
    save_state,
    simmim,
    state,
)

torch.set_num_threads(1)

SUFFIXES = (".safetensors", ".pth")
every_file = pytest.mark.parametrize(
    ("style", "suffix"),
    [("hf", ""), *itertools.product(("native", "timm", "microsoft", "torchvision"), SUFFIXES)],
)
#: Formats that hold a mask token and a pixel head.
PRETRAINING = ("native", "hf", "microsoft")


def same_tensors(found: Weights, expected: Weights) -> bool:
    return found.metas.keys() == expected.metas.keys() and all(
        torch.equal(found.tensor(name), expected.tensor(name)) for name in expected.metas
    )


def test_the_package_itself_offers_to_load_and_to_save() -> None:
    assert swinv2_scale.load_weights is load_weights
    assert swinv2_scale.save_weights is save_weights


@every_file
def test_a_model_saved_in_any_format_loads_back_bit_for_bit(style: Any, suffix: str, tmp_path: Path) -> None:
    model = classifier()
    sentences = save_weights(model, tmp_path / f"saved{suffix}", style)
    assert sentences == () if style != "timm" else "window_size=4" in sentences[0]
    loaded = other_values(classifier())
    report = load_weights(loaded, tmp_path / f"saved{suffix}")
    assert_same_bits(loaded, model)
    assert sorted(report.loaded) == sorted(state(model))
    assert not report.new
    assert not report.derived
    assert torch.equal(loaded(pictures()), model(pictures()))


@every_file
def test_the_report_says_which_format_was_found(style: Any, suffix: str, tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / f"saved{suffix}", style)
    report = load_weights(classifier(), tmp_path / f"saved{suffix}")
    assert report.style == style
    assert f"saved{suffix} ({FORMAT_NAMES[style]}): " in str(report)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_our_own_format_keeps_the_windows_that_a_model_was_trained_with_whatever_the_file(
    suffix: str, tmp_path: Path
) -> None:
    save_weights(classifier(image_size=64, window_size=8), tmp_path / f"saved{suffix}")
    report = load_weights(classifier(), tmp_path / f"saved{suffix}")
    assert report.pretrained_window_sizes == (8, 8)
    assert report.warnings == ()


def test_our_own_pickled_file_is_told_from_microsofts(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "ours.pth", "native")
    assert open_weights(tmp_path / "ours.pth").config() == classifier().config.settled


@pytest.mark.parametrize(("first", "second"), itertools.permutations(FORMATS, 2))
def test_weights_go_from_any_format_to_any_other_and_back_without_a_changed_bit(
    first: Any, second: Any, tmp_path: Path
) -> None:
    model = classifier()
    save_weights(model, tmp_path / named("first", first), first)
    geometry = {"image_size": 32, "window_size": 4, "pretrained_window_sizes": (0, 0)}
    write_weights(
        open_weights(tmp_path / named("first", first)), tmp_path / named("second", second), second, **geometry
    )
    write_weights(open_weights(tmp_path / named("second", second)), tmp_path / named("again", first), first, **geometry)
    assert same_tensors(open_weights(tmp_path / named("again", first)), open_weights(tmp_path / named("first", first)))
    loaded = other_values(classifier())
    load_weights(loaded, tmp_path / named("again", first))
    assert_same_bits(loaded, model)


def test_one_chain_through_all_formats_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = classifier(drop_path_rate=0.1)
    facts = Facts(pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6), labels=("a", "b", "c", "d", "e"))
    save_weights(model, tmp_path / "start.safetensors", facts=facts)
    source = tmp_path / "start.safetensors"
    for style in ("hf", "microsoft", "torchvision", "timm"):
        suffix = "" if style == "hf" else ".safetensors"
        write_weights(open_weights(source), tmp_path / f"{style}{suffix}", style)  # type: ignore[arg-type]
        source = tmp_path / f"{style}{suffix}"
    write_weights(open_weights(source), tmp_path / "end.safetensors", "native")
    assert (tmp_path / "end.safetensors").read_bytes() == (tmp_path / "start.safetensors").read_bytes()


@pytest.mark.parametrize(("first", "second"), itertools.permutations(PRETRAINING, 2))
def test_a_pretraining_model_goes_through_two_formats_bit_for_bit(first: Any, second: Any, tmp_path: Path) -> None:
    model = simmim()
    save_weights(model, tmp_path / named("first", first), first)
    write_weights(
        open_weights(tmp_path / named("first", first)),
        tmp_path / named("second", second),
        second,
        image_size=32,
        window_size=4,
    )
    loaded = other_values(simmim())
    report = load_weights(loaded, tmp_path / named("second", second))
    assert_same_bits(loaded, model)
    assert sorted(report.loaded) == sorted(state(model))
    assert any(name.startswith("encoder.") for name in report.loaded)


@pytest.mark.parametrize("style", ["timm", "torchvision"])
def test_formats_without_a_mask_token_say_that_the_pretraining_parts_are_left_out(style: Any, tmp_path: Path) -> None:
    sentence = save_weights(simmim(), tmp_path / named("saved", style), style)[0]
    for name in ("mask_token", "decoder.0.weight", "decoder.0.bias"):
        assert name in sentence
    loaded = other_values(simmim())
    report = load_weights(loaded, tmp_path / named("saved", style))
    assert set(report.new) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert_same_bits(loaded.encoder, simmim().encoder)


@pytest.mark.parametrize("style", PRETRAINING)
def test_a_classifier_takes_the_backbone_of_a_pretrained_file_and_says_what_it_drops(
    style: Any, tmp_path: Path
) -> None:
    save_weights(simmim(), tmp_path / named("pretrained", style), style)
    model = other_values(classifier())
    report = load_weights(model, tmp_path / named("pretrained", style))
    assert set(report.dropped) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert set(report.new) == {"head.weight", "head.bias"}
    assert len(report.loaded) == len(state(model)) - 2
    pretrained = state(simmim().encoder)
    for name, value in state(model).items():
        if not name.startswith("head."):
            assert torch.equal(value, pretrained[name])


def test_every_tensor_of_the_model_and_of_the_file_is_in_the_report_exactly_once(tmp_path: Path) -> None:
    source = classifier(num_classes=7)
    buffers = {f"layers.0.blocks.{block}.attn.k_bias": torch.zeros(12) for block in range(2)}
    path = save_pickle({"model": {**state(source), **buffers, "mask_token": torch.ones(1, 1, 12)}}, tmp_path / "x.pth")
    model = classifier(in_channels=4)
    report = load_weights(model, path)
    of_the_model = [*report.loaded, *report.derived, *report.new]
    assert sorted(of_the_model) == sorted(state(model))
    used = {*report.loaded, *report.derived}
    assert {*used, *report.dropped, *report.new} == {*state(source), *buffers, "mask_token"}
    assert set(report.derived) == {"patch_embed.proj.weight"}
    assert set(report.new) == {"head.weight", "head.bias"}
    counts = f"{len(report.loaded)} loaded, 1 derived, 2 new, {len(report.dropped)} dropped"
    assert counts in str(report)


def test_a_head_of_the_file_that_is_not_taken_is_among_the_dropped(tmp_path: Path) -> None:
    save_weights(classifier(num_classes=7), tmp_path / "saved.pth", "microsoft")
    assert {"head.weight", "head.bias"} <= set(load_weights(classifier(), tmp_path / "saved.pth").dropped)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "encoder.",
        "module.encoder.",
        "_orig_mod.module.",
        "module._orig_mod.",
    ],
)
def test_the_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    assert_holds_the_classifier(save_state(classifier(), tmp_path / "x.pth", prefix))


def test_simmims_old_word_for_the_bias_mlp_is_understood(tmp_path: Path) -> None:
    old = {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in state(simmim()).items()}
    assert any("rpe_mlp" in name for name in old)
    loaded = other_values(simmim())
    load_weights(loaded, save_pickle({"model": old, "epoch": 799}, tmp_path / "old.pth"))
    assert_same_bits(loaded, simmim())


@pytest.mark.parametrize("key", ["model", "state_dict", "module", "model_state_dict"])
def test_weights_are_found_where_trainers_put_them(key: str, tmp_path: Path) -> None:
    checkpoint = {key: state(classifier()), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}
    assert_holds_the_classifier(save_pickle(checkpoint, tmp_path / "x.pth"))


def test_weights_are_found_where_another_entry_has_the_word_too(tmp_path: Path) -> None:
    checkpoint = {"model": {"name": "swinv2", "depth": 3}, "state_dict": state(classifier())}
    assert_holds_the_classifier(save_pickle(checkpoint, tmp_path / "x.pth"))


def test_files_of_before_torch_1_6_are_read(tmp_path: Path) -> None:
    path = save_pickle(state(classifier()), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_holds_the_classifier(path)


def test_a_file_of_parameters_can_be_written_again_though_they_want_gradients(tmp_path: Path) -> None:
    path = save_pickle(dict(classifier().named_parameters()), tmp_path / "x.pth")
    write_weights(
        open_weights(path), tmp_path / "hf", "hf", image_size=32, window_size=4, pretrained_window_sizes=(0, 0)
    )
    assert_holds_the_classifier(tmp_path / "hf")


# --- Hugging Face's folders -------------------------------------------------------------------------------------------


def test_a_large_model_is_cut_into_files_with_an_index_as_hugging_face_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", 40_000)
    save_weights(classifier(), tmp_path / "hf", "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in state(classifier()).values())
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == held
    assert_holds_the_classifier(tmp_path / "hf")


def test_one_tensor_larger_than_a_whole_shard_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", 1)
    save_weights(classifier(), tmp_path / "hf", "hf")
    assert_holds_the_classifier(tmp_path / "hf")


def as_pickled_folder(folder: Path, num_files: int) -> None:
    """What transformers wrote before safetensors: pytorch_model.bin, or several of them and an index."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (folder / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {}
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = dict(list(tensors.items())[number::num_files])
        places |= dict.fromkeys(part, name)
        torch.save(part, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("num_files", [1, 3])
def test_pickled_hugging_face_folders_are_read(num_files: int, tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "hf", "hf")
    as_pickled_folder(tmp_path / "hf", num_files)
    loaded = other_values(classifier())
    assert load_weights(loaded, tmp_path / "hf").style == "hf"
    assert_same_bits(loaded, classifier())


def test_the_file_inside_a_hugging_face_folder_can_be_given_instead_of_the_folder(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "hf", "hf")
    loaded = other_values(classifier())
    assert load_weights(loaded, tmp_path / "hf" / "model.safetensors").pretrained_window_sizes == (4, 4)
    assert_same_bits(loaded, classifier())


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_bare_backbone_of_hugging_face_has_names_without_a_prefix(wrapper: str, tmp_path: Path) -> None:
    model = classifier(num_classes=0)
    save_weights(model, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Swinv2Model"]
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        names = sorted(file.keys())
        assert not [name for name in names if name.startswith("swinv2.")]
        tensors = {wrapper + name: file.get_tensor(name) for name in names}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    loaded = other_values(classifier(num_classes=0))
    load_weights(loaded, tmp_path / "hf")
    assert_same_bits(loaded, model)


def test_the_configuration_that_is_written_is_of_this_model(tmp_path: Path) -> None:
    fields = {"image_size": 64, "window_size": 8, "pretrained_window_sizes": (12, 6), "drop_path_rate": 0.3}
    model = classifier(**fields, in_channels=4)
    save_weights(model, tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {
        "architectures": ["Swinv2ForImageClassification"],
        "model_type": "swinv2",
        "image_size": 64,
        "patch_size": 4,
        "num_channels": 4,
        "embed_dim": 12,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 8,
        "pretrained_window_sizes": [12, 6],
        "mlp_ratio": 4.0,
        "drop_path_rate": 0.3,
        "encoder_stride": 8,
    }
    assert {key: written.get(key) for key in expected} == expected
    assert len(written["id2label"]) == 5
    assert open_weights(tmp_path / "hf").config() == model.config


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_configuration_that_is_written_names_the_type_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers 5 builds the model in this type: float64 weights would be rounded where it says float32."""
    save_weights(classifier().to(dtype), tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_labels_and_the_normalisation_of_pixels_travel_with_the_weights(tmp_path: Path) -> None:
    facts = Facts(pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6), labels=("a", "b", "c d", "é", "f"))
    save_weights(classifier(), tmp_path / "x.safetensors", facts=facts)
    write_weights(open_weights(tmp_path / "x.safetensors"), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c d", "3": "é", "4": "f"}
    assert config["label2id"]["c d"] == 2
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor["size"] == {"height": 32, "width": 32}
    write_weights(open_weights(tmp_path / "hf"), tmp_path / "again.safetensors", "native")
    found = open_weights(tmp_path / "again.safetensors").facts
    assert (found.pixel_mean, found.pixel_std, found.labels) == (facts.pixel_mean, facts.pixel_std, facts.labels)


def test_labels_of_more_than_ten_classes_keep_their_order(tmp_path: Path) -> None:
    labels = tuple(f"class {number}" for number in range(12, 0, -1))
    save_weights(classifier(num_classes=12), tmp_path / "hf", "hf", facts=Facts(labels=labels))
    assert open_weights(tmp_path / "hf").facts.labels == labels


def test_hugging_faces_placeholders_are_no_labels(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]["1"] == "LABEL_1"
    assert open_weights(tmp_path / "hf").facts.labels is None


def test_the_same_mean_for_all_channels_may_be_one_number_in_hugging_faces_file(tmp_path: Path) -> None:
    """``image_mean (float or list[float])`` in transformers' documentation."""
    save_weights(classifier(), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": 0.5, "image_std": 0.25}))
    facts = open_weights(tmp_path / "hf").facts
    assert (facts.pixel_mean, facts.pixel_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_a_configuration_beside_a_file_that_needs_none_may_be_anything(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('["of another program"]')
    assert open_weights(tmp_path / "x.safetensors").style == "native"


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("style", FORMATS)
def test_weights_keep_their_type_in_every_format(style: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = classifier().to(dtype)
    save_weights(model, tmp_path / named("x", style), style)
    loaded = other_values(classifier().to(dtype))
    load_weights(loaded, tmp_path / named("x", style))
    assert_same_bits(loaded, model)
    assert all(meta.dtype == dtype for meta in open_weights(tmp_path / named("x", style)).metas.values())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_of_several_types_keeps_each(suffix: str, tmp_path: Path) -> None:
    model = classifier().bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data = parameter.data.double() + 1e-9
    save_weights(model, tmp_path / f"x{suffix}")
    found = open_weights(tmp_path / f"x{suffix}")
    for name, value in state(model).items():
        assert found.tensor(name).dtype == value.dtype
        assert torch.equal(found.tensor(name), value)


def test_half_precision_weights_load_into_a_float32_model_as_the_same_numbers(tmp_path: Path) -> None:
    half = classifier().bfloat16()
    save_weights(half, tmp_path / "x.safetensors")
    loaded = classifier()
    load_weights(loaded, tmp_path / "x.safetensors")
    assert_same_bits(loaded, half.float())


def test_tensors_in_any_memory_layout_are_written_as_they_read(tmp_path: Path) -> None:
    tensors = state(classifier())
    for name, value in tensors.items():
        if value.ndim == 2:
            tensors[name] = value.T.contiguous().T
        elif value.ndim == 4:
            tensors[name] = value.to(memory_format=torch.channels_last)
    path = save_pickle(tensors, tmp_path / "x.pth")
    geometry = {"image_size": 32, "window_size": 4, "pretrained_window_sizes": (0, 0)}
    write_weights(open_weights(path), tmp_path / "y.safetensors", "native", **geometry)
    assert_holds_the_classifier(tmp_path / "y.safetensors")


def test_safetensors_files_are_those_of_the_library(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert sorted(file.keys()) == sorted(state(classifier()))
        for name, value in state(classifier()).items():
            assert torch.equal(file.get_tensor(name), value)


# --- our own header ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"drop_path_rate": 0.25, "num_classes": 0},
        {"image_size": (64, 32), "window_size": (4, 2)},
        {"in_channels": 13, "patch_size": 2, "image_size": 16},
        {"extra_norm_every": 2},
        {"extra_norm_every": 3, "extra_norm_counter": "model"},
        {"mlp_ratio": 2.5},
        {"mlp_ratio": 2.6, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        {"mlp_ratio": 8 / 3},
        {"pretrained_window_sizes": (12, (6, 3))},
    ],
    ids=str,
)
def test_our_own_format_knows_the_model_that_it_holds(fields: dict[str, Any], tmp_path: Path) -> None:
    model = classifier(**fields)
    save_weights(model, tmp_path / "x.safetensors")
    config = open_weights(tmp_path / "x.safetensors").config()
    assert config == model.config.settled
    loaded = classifier(**config.model_dump(exclude={"variant", "attention"}))
    report = load_weights(other_values(loaded), tmp_path / "x.safetensors")
    assert len(report.loaded) == len(state(model))
    assert_same_bits(loaded, model)


@pytest.mark.parametrize("ratio", [2.0, 2.6, 3.3, 8 / 3, 4.0])
def test_hidden_widths_of_every_stage_are_found_from_the_shapes_alone(ratio: float, tmp_path: Path) -> None:
    """Microsoft's files don't say the ratio, and int(dim * ratio) is rounded down in each stage by itself."""
    model = classifier(mlp_ratio=ratio, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    found = open_weights(save_state(model, tmp_path / "x.pth")).config(
        image_size=32, window_size=4, pretrained_window_sizes=(0, 0, 0, 0)
    )
    assert [int(dim * found.mlp_ratio) for dim in found.stage_dims] == [int(dim * ratio) for dim in (12, 24, 48, 96)]


@pytest.mark.parametrize("header", ["{", "[]", "null", "{}", '{"model": 3}', '{"model": {}, "pixel_mean": 1}'])
def test_a_header_that_is_not_ours_is_one_typed_error(header: str, tmp_path: Path) -> None:
    save_file(state(classifier()), tmp_path / "x.safetensors", {"swinv2_scale": header})
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        open_weights(tmp_path / "x.safetensors")


def test_fields_that_the_shapes_fix_cannot_be_given_otherwise(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="embed_dim"):
        write_weights(open_weights(tmp_path / "x.safetensors"), tmp_path / "hf", "hf", embed_dim=24)
    assert not (tmp_path / "hf").exists()


def test_what_a_file_does_not_say_can_be_given(tmp_path: Path) -> None:
    save_weights(classifier(), tmp_path / "timm.pth", "timm")
    source = open_weights(tmp_path / "timm.pth")
    with pytest.raises(WeightsError, match=r"doesn't say image_size, window_size, pretrained_window_sizes"):
        write_weights(source, tmp_path / "hf", "hf")
    write_weights(source, tmp_path / "hf", "hf", image_size=64, window_size=8, pretrained_window_sizes=(6, 3))
    found = open_weights(tmp_path / "hf").config()
    expected = ModelConfig.model_validate(
        {**classifier().config.model_dump(), "image_size": 64, "window_size": 8, "pretrained_window_sizes": (6, 3)}
    )
    assert found == expected


def test_the_crop_of_evaluations_travels_with_our_own_files(tmp_path: Path) -> None:
    facts = Facts(crop=CropRule(1.0, "squash", "bilinear"))
    save_weights(classifier(), tmp_path / "x.safetensors", facts=facts)
    assert open_weights(tmp_path / "x.safetensors").facts.crop == facts.crop
    save_weights(classifier(), tmp_path / "y.safetensors")
    assert open_weights(tmp_path / "y.safetensors").facts.crop is None


@pytest.mark.parametrize("crop", [(2.0, "center", "bicubic"), (0.9, "middle", "bicubic"), (0.9, "center", "x"), ("a",)])
def test_a_crop_that_is_none_is_refused(tmp_path: Path, crop: Any) -> None:
    save_weights(classifier(), tmp_path / "x.safetensors", facts=Facts(crop=crop))
    with pytest.raises(WeightsError, match="its own description"):
        open_weights(tmp_path / "x.safetensors")
