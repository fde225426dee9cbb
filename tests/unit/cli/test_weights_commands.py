"""``swinv2-scale convert|predict``: what they print, what they leave behind, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from swinv2_scale import create_model, load_weights, save_weights
from swinv2_scale.cli.main import main
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.weights.facts import Facts

SMALL = {"image_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "patch_size": 4}
NAMES = ("cat", "cup", "other")


@pytest.fixture(scope="module")
def model() -> SwinV2:
    """A classifier of three classes with random weights."""
    model = create_model("swinv2_tiny", num_classes=3, **SMALL).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, model: SwinV2) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model, path, facts=Facts(pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.25, 0.3), labels=NAMES))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real photographs."""
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(photographs.chelsea()).save(folder / "cat.png")
    Image.fromarray(photographs.coffee()).save(folder / "coffee.jpg", quality=95)
    (folder / "notes.txt").write_text("no image")
    return folder


def same_values(model: SwinV2, path: Path) -> bool:
    other = create_model("swinv2_tiny", num_classes=3, seed=9, **SMALL)
    load_weights(other, path)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("style", ["hf", "timm", "microsoft", "torchvision", "native"])
def test_weights_are_converted_into_every_format_and_keep_every_bit(style, tmp_path, model, weights, capsys):
    target = tmp_path / ("folder" if style == "hf" else "file.pth")
    assert main(["convert", str(weights), str(target), "--to", style]) == 0
    printed = capsys.readouterr().out
    assert "swinv2_scale's format, Swin V2 (embed_dim 12, depths [2, 2], num_heads [2, 2])" in printed
    assert str(target) in printed
    assert "79 tensors" in printed
    assert same_values(model, target)


def test_a_file_that_does_not_say_its_size_can_be_told(tmp_path, model, weights, capsys):
    assert main(["convert", str(weights), str(tmp_path / "timm.pth"), "--to", "timm"]) == 0
    again = ["convert", str(tmp_path / "timm.pth"), str(tmp_path / "hf"), "--to", "hf"]
    assert main(again) == 65
    assert "doesn't say image_size, window_size, pretrained_window_sizes of its model" in capsys.readouterr().err
    assert main([*again, "--set", "image_size=64", "window_size=4"]) == 65
    assert "pretrained_window_sizes=[0, 0] means: its own windows" in capsys.readouterr().err
    assert main([*again, "--set", "image_size=64", "window_size=4", "pretrained_window_sizes=[0,0]"]) == 0
    assert same_values(model, tmp_path / "hf")


def test_exporting_for_another_size_keeps_the_windows_of_the_training(tmp_path, weights):
    arguments = [
        "convert",
        str(weights),
        str(tmp_path / "hf"),
        "--to",
        "hf",
        "--set",
        "image_size=128",
        "window_size=8",
    ]
    assert main(arguments) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_size"], config["window_size"], config["pretrained_window_sizes"]) == (128, 8, [4, 4])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "nothing.pth", "DST", "--to", "hf"], 65, "no such file or folder"),
        (["convert", "SRC", "DST", "--to", "keras"], 78, "invalid choice: 'keras'"),
        (["convert", "SRC", "DST", "--to", "timm"], 65, "name a file that ends with .safetensors or .pth"),
        (["convert", "SRC", "DST", "--to", "hf", "--set", "windowsize=4"], 78, "did you mean window_size?"),
        (["convert", "SRC", "DST", "--to", "hf", "--set", "image_size=[64,128]"], 65, "aren't all square"),
        (["convert", "SRC", "SRC", "--to", "native"], 73, "is there already; nothing is overwritten"),
        (["export", "SRC", "DST", "--format", "hf"], 65, "is a file"),
        (["predict", "SRC", "IMAGES", "--top-k", "0"], 78, "0 is less than 1"),
        (["predict", "SRC", "nothing.png"], 65, "nothing.png doesn't exist"),
        (["predict", "SRC", "IMAGES/notes.txt"], 65, "has no image"),
        (["predict", "SRC", "IMAGES", "--labels", "nothing.txt"], 78, "cannot read the class names"),
        (["predict", "SRC", "IMAGES", "--labels", "TWO"], 78, "has 2 names, the model has 3 classes"),
        (["predict", "SRC", "IMAGES", "--picture", "/proc/none.png"], 73, "--picture"),
    ],
)
def test_what_cannot_be_done_ends_with_one_error(arguments, code, message, tmp_path, weights, images, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    words = {"SRC": weights, "DST": tmp_path / "out", "IMAGES": images, "TWO": tmp_path / "two.txt"}
    filled = [str(words.get(word, word)).replace("IMAGES", str(images)) for word in arguments]
    try:
        found = main(filled)
    except SystemExit as usage:  # argparse's own
        found = int(str(usage.code))
    assert found == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_prediction_names_the_likeliest_classes_and_draws_them(tmp_path, model, weights, images, capsys):
    picture = tmp_path / "deep" / "picture.png"
    assert main(["predict", str(weights), str(images), "--top-k", "2", "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")][:2] == [
        str(images / "cat.png"),
        str(images / "coffee.jpg"),
    ]
    assert sum(line.startswith("  ") for line in lines) == 4
    with Image.open(picture) as drawn:
        assert drawn.width > 400
        assert np.asarray(drawn)[:, :160].std() > 20  # the photographs are in it


def test_predicted_probabilities_are_the_models_for_the_central_seven_eighths(tmp_path, model, weights, images, capsys):
    command = ["predict", str(weights), str(images / "cat.png"), "--json", "--picture", str(tmp_path / "p.png")]
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)
    image = Image.open(images / "cat.png").convert("RGB")
    resized = tuple(int(73 * side / min(image.size)) for side in image.size)  # 64 px are seven eighths of 73
    left, top = (round((side - 64) / 2) for side in resized)
    image = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    pixels = np.asarray(image, np.float32) / 255
    normalised = (pixels - np.float32([0.4, 0.5, 0.6])) / np.float32([0.2, 0.25, 0.3])
    with torch.no_grad():
        wanted = model(torch.from_numpy(normalised).permute(2, 0, 1)[None])[0].softmax(0)
    assert [name for name, _ in found["top"]] == [NAMES[i] for i in wanted.argsort(descending=True)]
    # Float32, the same operations in another order.
    assert [p for _, p in found["top"]] == pytest.approx(wanted.sort(descending=True).values.tolist(), rel=1e-4)


def test_photographs_are_classified_as_the_camera_was_held(tmp_path, weights, capsys):
    upright = Image.fromarray(photographs.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees, clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    files = [str(tmp_path / name) for name in ("turned.png", "upright.png")]
    assert main(["predict", str(weights), *files, "--json", "--picture", str(tmp_path / "p.png")]) == 0
    turned, straight = json.loads(capsys.readouterr().out)
    assert turned["top"] == straight["top"]


def test_images_have_one_or_three_channels(tmp_path, images, capsys):
    save_weights(create_model("swinv2_tiny", num_classes=3, in_channels=5, **SMALL), tmp_path / "five.safetensors")
    assert main(["predict", str(tmp_path / "five.safetensors"), str(images)]) == 78
    assert "reads 5 channels" in capsys.readouterr().err


def test_weights_without_a_class_head_predict_nothing(tmp_path, images, capsys):
    save_weights(create_model("swinv2_tiny", **SMALL), tmp_path / "headless.safetensors")
    assert main(["predict", str(tmp_path / "headless.safetensors"), str(images)]) == 65
    assert "has no class head" in capsys.readouterr().err


def test_classes_without_names_are_numbered(tmp_path, model, images, capsys):
    save_weights(model, tmp_path / "nameless.safetensors")
    command = ["predict", str(tmp_path / "nameless.safetensors"), str(images), "--picture", str(tmp_path / "p.png")]
    assert main(command) == 0
    assert "class 0" in capsys.readouterr().out
