"""Our files in the libraries that they are for, and those libraries' files in our models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models import resnet18, swin_t
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    Swinv2Model,
)

from swinv2_scale.errors import WeightsError
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.weights import write
from swinv2_scale.weights.api import load_weights, save_weights
from swinv2_scale.weights.facts import Facts
from swinv2_scale.weights.read import open_weights
from tests.parity.cases import TOLERANCE, relative_difference
from tests.unit.weights.small import assert_same_bits, classifier, other_values, pictures, randomise, simmim, state

torch.set_num_threads(1)

#: Weights go through the files in float32, bit for bit; numbers are compared in float64, see TOLERANCE.
DEEP: dict[str, Any] = {"depths": (2, 2), "window_size": 4, "image_size": 32}
#: Fine-tuned at another window than it was pre-trained with; the last map is one window.
FINE_TUNED: dict[str, Any] = {**DEEP, "image_size": 64, "window_size": 8, "pretrained_window_sizes": (6, 3)}
MODELS = [pytest.param(DEEP, id="one window size"), pytest.param(FINE_TUNED, id="fine-tuned at another")]


@torch.no_grad()
def same_logits(ours: nn.Module, theirs: nn.Module, size: int, channels: int = 3) -> bool:
    x = pictures(channels, size).double()
    found = theirs.double().eval()(x)
    logits: Tensor = getattr(found, "logits", found)
    return relative_difference(ours.double().eval()(x), logits) < TOLERANCE


def from_pretrained(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """Every tensor must find its place, none may be left."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model  # type: ignore[no-any-return]


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", MODELS)
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000])
def test_the_exported_folder_is_a_classifier_with_our_logits(
    fields: dict[str, Any], shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", shard_bytes)
    model = classifier(**fields)
    save_weights(model, tmp_path / "hf", "hf", facts=Facts(labels=("a", "b", "c", "d", "e")))
    theirs = from_pretrained(AutoModelForImageClassification, tmp_path / "hf")
    assert isinstance(theirs, Swinv2ForImageClassification)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    assert same_logits(model, theirs, fields["image_size"])


@pytest.mark.parametrize("channels", [1, 4])
def test_the_exported_folder_has_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    model = classifier(in_channels=channels)
    save_weights(model, tmp_path / "hf", "hf")
    assert same_logits(model, from_pretrained(AutoModelForImageClassification, tmp_path / "hf"), 32, channels)


def test_a_ratio_whose_hidden_widths_are_rounded_in_every_stage_is_exported(tmp_path: Path) -> None:
    model = classifier(mlp_ratio=2.6, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), image_size=64, window_size=2)
    save_weights(model, tmp_path / "hf", "hf")
    assert same_logits(model, from_pretrained(AutoModelForImageClassification, tmp_path / "hf"), 64)


def test_float64_weights_stay_float64_in_transformers(tmp_path: Path) -> None:
    model = classifier().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-12)  # what float32 doesn't hold
    save_weights(model, tmp_path / "hf", "hf")
    theirs = from_pretrained(AutoModelForImageClassification, tmp_path / "hf")
    assert theirs.classifier.weight.dtype == torch.float64
    assert torch.equal(theirs.classifier.weight, model.head.weight)


def test_the_exported_backbone_is_a_bare_model_with_our_features(tmp_path: Path) -> None:
    model = classifier(**DEEP, num_classes=0)
    save_weights(model, tmp_path / "hf", "hf")
    theirs = from_pretrained(AutoModel, tmp_path / "hf").double().eval()
    assert isinstance(theirs, Swinv2Model)
    x = pictures().double()
    with torch.no_grad():
        assert relative_difference(model.double()(x), theirs(x).pooler_output) < TOLERANCE


@pytest.mark.parametrize("channels", [1, 3])
def test_the_exported_pretraining_model_reconstructs_what_ours_does(channels: int, tmp_path: Path) -> None:
    model = simmim(**DEEP, in_channels=channels).double()
    save_weights(model.float(), tmp_path / "hf", "hf")
    theirs = from_pretrained(Swinv2ForMaskedImageModeling, tmp_path / "hf").double().eval()
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, channels, 32, 32), generator=generator, dtype=torch.uint8)
    hidden = torch.rand(2, 4, 4, generator=generator) < 0.6
    with torch.no_grad():
        _, prediction = model.double()(images, hidden, decode_all=True)
        tokens = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        found = theirs(model.normalised(images).double(), bool_masked_pos=tokens).reconstruction
    # Our prediction leaves the model in float32: one rounding of 2**-24.
    torch.testing.assert_close(prediction.double(), found, rtol=2**-23, atol=0)


def test_the_exported_preprocessor_normalises_as_the_model_was_trained(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_weights(classifier(), tmp_path / "hf", "hf", facts=Facts(pixel_mean=mean, pixel_std=std))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    expected = ((torch.from_numpy(pixels).permute(2, 0, 1) / 255).sub(torch.tensor(mean)[:, None, None])) / (
        torch.tensor(std)[:, None, None]
    )
    # float32 numbers up to 2.25, in another order of division and subtraction.
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    resized = processor(Image.fromarray(pixels).resize((50, 41)), return_tensors="pt")["pixel_values"]
    assert resized.shape == (1, 3, 32, 32)


def test_the_exported_preprocessor_serves_grey_models_too(tmp_path: Path) -> None:
    save_weights(classifier(in_channels=1), tmp_path / "hf", "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    found = processor(np.zeros((32, 32, 1), np.uint8), return_tensors="pt", input_data_format="channels_last")
    assert found["pixel_values"].shape == (1, 1, 32, 32)


def hugging_face_config(**fields: Any) -> Swinv2Config:
    return Swinv2Config(
        image_size=64,
        window_size=8,
        pretrained_window_sizes=[6, 3],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        encoder_stride=8,
        **fields,
    )


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_what_transformers_saves_is_read_with_its_windows(max_shard_size: str, tmp_path: Path) -> None:
    theirs = Swinv2ForImageClassification(hugging_face_config(num_labels=5))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
    model = other_values(classifier(**{**FINE_TUNED, "pretrained_window_sizes": None}))
    report = load_weights(model, tmp_path / "hf")
    assert (report.style, report.pretrained_window_sizes, report.warnings) == ("hf", (6, 3), ())
    assert same_logits(model, theirs, 64)


def test_what_transformers_saves_of_a_fresh_pretraining_model_has_a_mask_token_to_be_warned_of(tmp_path: Path) -> None:
    Swinv2ForMaskedImageModeling(hugging_face_config()).save_pretrained(tmp_path / "hf")
    report = load_weights(simmim(depths=(2, 2), image_size=64, window_size=8), tmp_path / "hf")
    assert any("mask token" in warning for warning in report.warnings)
    assert {"mask_token", "decoder.0.weight", "decoder.0.bias"} <= set(report.loaded)
    assert not report.new


def test_what_transformers_saves_in_half_precision_is_read(tmp_path: Path) -> None:
    theirs = Swinv2ForImageClassification(hugging_face_config(num_labels=5)).bfloat16()
    theirs.save_pretrained(tmp_path / "hf")
    model = classifier(**{**FINE_TUNED, "pretrained_window_sizes": None})
    load_weights(model, tmp_path / "hf")
    assert torch.equal(model.head.weight, theirs.classifier.weight.float())


@pytest.mark.parametrize("processor", ["ViTImageProcessor"])
def test_the_normalisation_that_transformers_saves_is_read(processor: str, tmp_path: Path) -> None:
    Swinv2ForImageClassification(hugging_face_config(num_labels=5)).save_pretrained(tmp_path / "hf")
    from transformers import ViTImageProcessor

    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "hf")
    facts = open_weights(tmp_path / "hf").facts
    assert (facts.pixel_mean, facts.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_options(fields: dict[str, Any]) -> dict[str, Any]:
    """What create_model must be told, for timm keeps none of it in its files."""
    options = {"embed_dim": 12, "num_heads": (2, 4), "num_classes": 5, "img_size": fields["image_size"]}
    windows = fields.get("pretrained_window_sizes") or (0,) * len(fields["depths"])
    return {
        **options,
        "depths": fields["depths"],
        "window_size": fields["window_size"],
        "pretrained_window_sizes": windows,
    }


@pytest.mark.parametrize("fields", MODELS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_timm_file_is_a_checkpoint_for_create_model_with_our_logits(
    fields: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    model = classifier(**fields)
    path = tmp_path / f"x{suffix}"
    save_weights(model, path, "timm")
    theirs = timm.create_model("swinv2_tiny_window8_256", checkpoint_path=str(path), **timm_options(fields))
    assert same_logits(model, theirs, fields["image_size"])


def test_timms_checkpoints_are_read(tmp_path: Path) -> None:
    theirs = timm.create_model("swinv2_tiny_window8_256", **timm_options(DEEP))
    randomise(theirs)
    torch.save({"state_dict": theirs.state_dict(), "arch": "swinv2_tiny_window8_256"}, tmp_path / "x.pth")
    model = other_values(classifier(**DEEP))
    assert load_weights(model, tmp_path / "x.pth").style == "timm"
    assert same_logits(model, theirs, 32)


def test_what_timm_saves_for_the_hub_is_read_with_the_windows_that_it_was_made_with(tmp_path: Path) -> None:
    options = timm_options({**FINE_TUNED})
    theirs = timm.create_model("swinv2_tiny_window8_256", **options)
    randomise(theirs)
    timm.models.save_for_hf(theirs, tmp_path / "hub", model_args={**options, "depths": [2, 2], "num_heads": [2, 4]})
    model = other_values(classifier(**{**FINE_TUNED, "pretrained_window_sizes": None}))
    report = load_weights(model, tmp_path / "hub")
    assert report.pretrained_window_sizes == (6, 3)
    assert same_logits(model, theirs, 64)


def test_timms_own_reader_of_microsofts_files_takes_ours(tmp_path: Path) -> None:
    """The only other program here that knows Microsoft's names."""
    model = classifier(**FINE_TUNED)
    save_weights(model, tmp_path / "x.pth", "microsoft")
    theirs = SwinTransformerV2(**timm_options(FINE_TUNED))
    theirs.load_state_dict(checkpoint_filter_fn(torch.load(tmp_path / "x.pth", weights_only=True), theirs))
    assert same_logits(model, theirs, 64)


# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision_model(
    window: tuple[int, int] = (4, 4), depths: tuple[int, ...] = (2, 2), heads: tuple[int, ...] = (2, 4)
) -> nn.Module:
    return SwinTransformer(
        [4, 4],
        12,
        list(depths),
        list(heads),
        list(window),
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


@pytest.mark.parametrize("window", [4, (4, 2)], ids=str)
def test_the_torchvision_file_fits_its_model_key_by_key_with_our_logits(window: Any, tmp_path: Path) -> None:
    model = classifier(**{**DEEP, "window_size": window})
    save_weights(model, tmp_path / "x.pth", "torchvision")
    theirs = torchvision_model(model.config.window_shape)
    fresh = {name: value.clone() for name, value in theirs.state_dict().items() if "relative" in name}
    theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    for name, value in fresh.items():
        assert torch.equal(theirs.state_dict()[name], value)
    assert same_logits(model, theirs, 32)


def test_torchvisions_files_are_read_with_the_window_of_their_tables(tmp_path: Path) -> None:
    theirs = torchvision_model()
    randomise(theirs)
    with torch.no_grad():  # its keys have no bias: it writes zeros there in every forward
        theirs(pictures())
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = other_values(classifier(**DEEP))
    report = load_weights(model, tmp_path / "x.pth")
    assert (report.style, report.pretrained_window_sizes) == ("torchvision", (4, 4))
    assert same_logits(model, theirs, 32)


# --- numbers that a library's code would compute otherwise ------------------------------------------------------------


#: Three stages: maps that divide, that are odd before merging, that end in one token, smaller than the window.
SIZES = [(image, window) for image in (32, 36, 48, 50, 64) for window in (2, 3, 4, 6, 8, 9) if window <= image // 4]


@pytest.mark.parametrize("style", ["hf", "timm", "torchvision"])
@pytest.mark.parametrize("pretrained", [None, (4, 4, 4)], ids=["windows unset", "windows set"])
def test_whatever_is_exported_has_our_logits_in_the_library(style: Any, pretrained: Any, tmp_path: Path) -> None:
    exported, refused = [], []
    for image, window in SIZES:
        fields: dict[str, Any] = {"image_size": image, "window_size": window, "pretrained_window_sizes": pretrained}
        fields |= {"depths": (1, 2, 2), "num_heads": (2, 2, 4)}
        model = classifier(**fields)
        path = tmp_path / (f"{image}-{window}" + (".pth" if style != "hf" else ""))
        try:
            save_weights(model, path, style)
        except WeightsError:
            refused.append((image, window))
            continue
        exported.append((image, window))
        if style == "hf":
            theirs = from_pretrained(AutoModelForImageClassification, path)
        elif style == "timm":
            options = {**timm_options(fields), "num_heads": fields["num_heads"]}
            theirs = timm.create_model("swinv2_tiny_window8_256", checkpoint_path=str(path), **options)
        else:
            theirs = torchvision_model((window, window), fields["depths"], fields["num_heads"])
            theirs.load_state_dict(torch.load(path, weights_only=True))
        assert same_logits(model, theirs, image), (image, window)
    assert exported
    assert refused


def strangers() -> dict[str, nn.Module]:
    small = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    return {
        "Swin V1": timm.create_model("swin_tiny_patch4_window7_224", **small),
        "swinv2_cr": timm.create_model("swinv2_cr_tiny_224", **small),
        "Vision Transformer": timm.create_model("vit_tiny_patch16_224", depth=1),
        "convolutional": resnet18(),
        "no Swin Transformer": nn.Linear(2, 2),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {**strangers(), "Swin V1 of torchvision": swin_t()}


@pytest.mark.parametrize(
    "kind",
    ["Swin V1", "swinv2_cr", "Vision Transformer", "convolutional", "no Swin Transformer", "Swin V1 of torchvision"],
)
def test_other_architectures_are_called_what_they_are(kind: str, models: dict[str, nn.Module], tmp_path: Path) -> None:
    tensors = models[kind].state_dict()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as refusal:
        load_weights(classifier(), tmp_path / "x.safetensors")
    assert kind.removesuffix(" of torchvision") in str(refusal.value)


def test_a_chain_through_every_library_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Ours -> transformers loads and saves -> ours -> timm loads and saves -> ours -> torchvision -> ours."""
    model = classifier(**DEEP)
    save_weights(model, tmp_path / "hf", "hf")
    from_pretrained(AutoModelForImageClassification, tmp_path / "hf").save_pretrained(tmp_path / "hf again")
    second = loaded(tmp_path / "hf again")
    save_weights(second, tmp_path / "timm.safetensors", "timm")
    theirs = timm.create_model(
        "swinv2_tiny_window8_256", checkpoint_path=str(tmp_path / "timm.safetensors"), **timm_options(DEEP)
    )
    torch.save(theirs.state_dict(), tmp_path / "timm again.pth")
    third = loaded(tmp_path / "timm again.pth")
    save_weights(third, tmp_path / "torchvision.pth", "torchvision")
    torchvision = torchvision_model()
    torchvision.load_state_dict(torch.load(tmp_path / "torchvision.pth", weights_only=True))
    torch.save(torchvision.state_dict(), tmp_path / "torchvision again.pth")
    assert_same_bits(loaded(tmp_path / "torchvision again.pth"), model)


def loaded(path: Path) -> SwinV2:
    model = classifier(**DEEP)
    other_values(model)
    report = load_weights(model, path)
    assert sorted(report.loaded) == sorted(state(model))
    return model


def test_the_written_configuration_is_what_transformers_writes_for_the_same_model(tmp_path: Path) -> None:
    model = classifier(**FINE_TUNED)
    save_weights(model, tmp_path / "hf", "hf")
    Swinv2Config.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    derived = {"transformers_version", "hidden_size", "num_layers"}
    assert {key: value for key, value in ours.items() if key not in derived}.items() <= theirs.items()
    assert (ours["hidden_size"], len(ours["depths"])) == (24, 2)
