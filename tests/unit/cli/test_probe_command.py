"""swinv2-scale probe: features of any weights, told by what is near."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_scale.cli.main import main
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.weights.api import save_weights
from swinv2_scale.weights.facts import Facts
from tests.support.pictures import encoded
from tests.unit.weights.small import classifier, simmim

MODEL = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "in_channels": 1}


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright ones of class 1, dark ones of class 0, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return (rng.integers(0, 40, (count, 32, 32)) + 120 * labels[:, None, None]).astype(np.uint8), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    for name, count, seed in (("train", 70, 1), ("validation", 67, 2)):
        samples = [
            {"__key__": f"{number:03d}", "png": encoded(image, "PNG"), "cls": str(label).encode()}
            for number, (image, label) in enumerate(zip(*images(count, seed), strict=True))
        ]
        write_shards(samples, folder / name, samples_per_shard=40, made_by="a test")
    facts = Facts(pixel_mean=(0.5,), pixel_std=(0.25,))
    save_weights(simmim(**MODEL), folder / "simmim.safetensors", facts=facts)
    save_weights(classifier(**MODEL), folder / "classifier.safetensors", facts=facts)
    return folder


def probe(folder: Path, *words: str, weights: str = "simmim.safetensors") -> int:
    shards = ["--train", f"{folder}/train/*.tar", "--validation", f"{folder}/validation/*.tar"]
    return main(["probe", str(folder / weights), *shards, "--workers", "0", "--crop-pct", "1", *words])


def test_a_pre_trainings_features_are_probed_with_every_sample_counted_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(folder, "--json", "-k", "3", "--temperature", "0.5") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train"]["samples"], found["validation"]["samples"], found["classes"]) == (70, 67, 2)
    encoder = simmim(**MODEL).encoder

    def features(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        pixels, labels = images(count, seed)
        normalised = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            values = torch.cat([encoder.forward_features(image[None, None]) for image in normalised])
        return torch.nn.functional.normalize(values, dim=1), labels

    (known, labels), (asked, wanted) = features(70, 1), features(67, 2)
    right = 0
    for query, label in zip(asked, wanted, strict=True):
        cosines = known @ query
        nearest = cosines.topk(3).indices
        votes = [sum(float((cosines[i] / 0.5).exp()) for i in nearest if labels[i] == c) for c in (0, 1)]
        right += int(np.argmax(votes)) == label
    # One sample whose neighbours' cosines differ by a rounding may go either way.
    assert found["knn"]["top1"] == pytest.approx(right / 67, abs=1.5 / 67)
    assert found["linear"]["top1"] > 0.95  # brightness is what any features keep
    assert list(found["linear"]["held_out_top1"]) == ["1", "0.1", "0.01", "0.001", "0.0001", "1e-05"]


def test_the_table_names_both_methods_and_a_given_penalty_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(folder, "--penalty", "0.01", weights="classifier.safetensors") == 0
    out = capsys.readouterr().out
    assert "k-NN (k 20, temperature 0.07)" in out
    assert "linear (penalty 0.01)" in out
    assert "67 of" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-k", "71"], 78, "--train has 70 samples"),
        (["--crop-pct", "1.5"], 78, "at most 1"),
        (["--ema"], 78, "leave out --ema"),
        (["--penalty", "-1"], 78, "above 0"),
        (["--set", "num_classes=3"], 65, "leave out num_classes"),
    ],
)
def test_what_cannot_be_probed_is_said(
    folder: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = probe(folder, *words)
    except SystemExit as usage:
        found = int(str(usage.code))
    assert found == code
    assert said in capsys.readouterr().err


def test_labels_that_the_training_samples_lack_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"__key__": "a", "png": encoded(np.zeros((32, 32), np.uint8), "PNG")}
    write_shards([{**sample, "cls": b"2"}], folder / "other", samples_per_shard=1, made_by="a test")
    assert probe(folder, "--validation", f"{folder}/other/*.tar") == 65
    assert "labels up to 2, --train up to 1" in capsys.readouterr().err
    write_shards([{**sample, "json": b'{"label": [0, 1]}'}], folder / "several", samples_per_shard=1, made_by="a test")
    assert probe(folder, "--validation", f"{folder}/several/*.tar") == 65
    assert "not an integer" in capsys.readouterr().err
