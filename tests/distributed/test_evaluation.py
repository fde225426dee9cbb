"""launch/evaluate.py: the same numbers from any number of processes, and what it won't evaluate."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinv2_scale.cli.evaluate import evaluate as cli_evaluate
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.weights.api import save_weights
from swinv2_scale.weights.facts import Facts
from tests.support.processes import REPOSITORY, Finished, start
from tests.unit.weights.small import classifier, simmim

#: No number of ranks from 2 to 5 divides them, nor does the batch; the last ranks get nothing but repeats.
SAMPLES = 61
MODEL = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4), "in_channels": 1, "num_classes": 10}
CONFIG = """
model: {variant: tiny, image_size: 32, in_channels: 1, embed_dim: 12, depths: [1, 1], num_heads: [2, 4], window_size: 4,
  num_classes: 10}
data: {train: "embedded:fashion-mnist/train", validation: "embedded:fashion-mnist/validation", global_batch_size: 16,
  micro_batch_size: 8, num_workers: 1, pixel_mean: [0.286], pixel_std: [0.353]}
task: {name: classification, crop_pct: 0.9}
optim: {lr: 1.0e-3, total_steps: 1}
engine: {precision: fp32}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's YAML and weights that tell classes apart by chance."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "stage.yaml").write_text(CONFIG)
    save_weights(classifier(**MODEL), folder / "weights.safetensors", facts=Facts(labels=None))
    return folder


def evaluate(folder: Path, *words: object, processes: int = 1, weights: str = "weights.safetensors") -> Finished:
    options = ("--config", folder / "stage.yaml", "--weights", folder / weights, "--output", folder / f"{processes}")
    words = (*options, f"data.shards_dir={folder / 'shards'}", *words)
    return start(REPOSITORY / "launch" / "evaluate.py", *words, processes=processes).wait()


def result(folder: Path, processes: int, name: str = "weights-32px-window4") -> str:
    return (folder / str(processes) / f"{name}.json").read_text()


def by_hand(folder: Path) -> tuple[list[int], list[torch.Tensor]]:
    """Labels and logits of the first samples, one at a time, by Pillow and the bare model."""
    model, labels, logits = classifier(**MODEL), [], []
    with tarfile.open(min((folder / "shards" / "fashion-mnist" / "validation").glob("*.tar"))) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name in sorted(key for key in files if key.endswith(".png"))[:SAMPLES]:
        # 35 = int(32 / 0.9), and the crop begins at round(1.5).
        image = Image.open(io.BytesIO(files[name])).resize((35, 35), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255 - np.float32(0.286)) / 0.353
        with torch.no_grad():
            logits.append(model(pixels[None, None])[0])
        labels.append(int(files[name.replace(".png", ".cls")]))
    return labels, logits


def test_one_two_and_three_processes_write_the_same_numbers_and_they_are_those_of_a_loop(folder: Path) -> None:
    for processes in (1, 2, 3):
        finished = evaluate(folder, f"evaluation.samples={SAMPLES}", processes=processes)
        assert finished.code == 0, finished.output
    first = result(folder, 1)
    assert result(folder, 2) == result(folder, 3) == first
    found = json.loads(first)
    labels, logits = by_hand(folder)
    ranks = [int((scores > scores[label]).sum()) for scores, label in zip(logits, labels, strict=True)]
    assert found["samples"] == SAMPLES
    assert found["metrics"]["top1"] == sum(rank == 0 for rank in ranks) / SAMPLES
    assert found["metrics"]["top5"] == sum(rank < 5 for rank in ranks) / SAMPLES
    losses = torch.nn.functional.cross_entropy(torch.stack(logits), torch.tensor(labels))
    assert found["metrics"]["loss"] == pytest.approx(float(losses), rel=1e-5)  # float32, one image at a time
    rows = {row["label"]: row for row in found["per_class"]}
    assert [rows[label]["samples"] for label in range(10)] == np.bincount(labels, minlength=10).tolist()
    assert sum(row["right"] for row in found["per_class"]) == sum(rank == 0 for rank in ranks)
    with Image.open(folder / "1" / "weights-32px-window4.png") as picture:
        assert picture.width > 300


def in_process(folder: Path, *words: object, weights: str = "weights.safetensors", config: str = "stage.yaml") -> int:
    options = ["--config", folder / config, "--weights", folder / weights, "--output", folder / "here"]
    return cli_evaluate([str(word) for word in (*options, f"data.shards_dir={folder / 'shards'}", *words)])


def test_another_size_and_window_keep_the_scale_of_the_position_bias(folder: Path) -> None:
    words = ("model.image_size=48", "model.window_size=6", "evaluation.samples=9", "data.num_workers=0")
    assert in_process(folder, *words) == 0
    found: dict[str, Any] = json.loads((folder / "here" / "weights-48px-window6.json").read_text())
    assert found["pretrained_window_sizes"] == [4, 4]  # those of the weights, not of 48 px
    assert (found["image_size"], found["window_size"], found["samples"]) == (48, 6, 9)


@pytest.fixture(scope="module")
def others(folder: Path) -> Path:
    """Weights that this stage can't be evaluated with."""
    save_weights(classifier(**{**MODEL, "num_classes": 7}), folder / "seven.safetensors")
    save_weights(classifier(**{**MODEL, "depths": (1, 2)}), folder / "deeper.safetensors")
    save_weights(simmim(**{**MODEL, "num_classes": 0}), folder / "simmim.safetensors")
    return folder


@pytest.mark.parametrize(
    ("weights", "words", "code", "said"),
    [
        ("seven.safetensors", [], 65, "has a head of 7 classes, model.num_classes is 10"),
        ("deeper.safetensors", [], 65, "depths [1, 2]"),
        ("simmim.safetensors", [], 65, "swinv2-scale probe"),
        ("weights.safetensors", ["task.name=simmim", "task.mask_patch_size=4"], 78, "is a stage of simmim"),
        ("weights.safetensors", ["data.validation=null"], 78, "has no data.validation"),
        ("weights.safetensors", ["--best"], 78, "--best is for runs and checkpoints"),
        ("weights.safetensors", ["--average"], 78, "--average is for runs and checkpoints"),
        ("nothing.safetensors", [], 65, "no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_said_with_what_to_do(
    others: Path, weights: str, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(others, *words, weights=weights) == code
    error = capsys.readouterr().err
    assert said in error
    assert "next:" in error
    assert "Traceback" not in error


def write(folder: Path, name: str, labels: list[str], **schema: object) -> str:
    """A shard of grey images with these .cls (or, in braces, .json) files."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((28, 28), 90, np.uint8)).save(buffer, "PNG")
    samples = [
        {"__key__": f"{number:03d}", "png": buffer.getvalue(), "json" if label[0] == "{" else "cls": label.encode()}
        for number, label in enumerate(labels)
    ]
    write_shards(samples, folder / name, samples_per_shard=100, made_by="a test", schema=schema)
    return f"data.validation={folder / name}/*.tar"


@pytest.mark.parametrize(
    ("name", "labels", "schema", "said"),
    [
        ("too-large", ["3", "10"], {}, "10"),
        ("negative", ["3", "-1"], {}, "whole number"),
        ("several", ["3", '{"label": [1, 2]}'], {}, "one whole number"),
        ("words", ["3", "cat"], {}, "one whole number"),
        ("twelve", ["3"], {"classes": [f"class {n}" for n in range(12)]}, "12 classes"),
    ],
)
def test_labels_that_the_model_has_no_class_for_are_refused(
    folder: Path,
    name: str,
    labels: list[str],
    schema: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert in_process(folder, write(folder, name, labels, **schema), "data.num_workers=0") == 65
    assert said in capsys.readouterr().err


def test_a_damaged_image_on_one_rank_ends_all_of_them_with_its_name(folder: Path) -> None:
    pattern = write(folder, "damaged", ["3"] * 40)
    tar = folder / "damaged" / "000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"IDAT", len(content) // 2) + 9] ^= 255
    tar.write_bytes(content)
    finished = evaluate(folder, pattern, processes=2)
    assert finished.code == 65
    assert finished.output.count("error:") == 1
    assert "is damaged: its checksum differs" in finished.output
    allowed = evaluate(folder, pattern, "data.max_quarantined_share=0.1", processes=2)
    assert allowed.code == 0, allowed.output
    found = json.loads(result(folder, 2))
    assert (found["samples"], found["damaged"]) == (39, 1)


def test_without_a_run_it_is_asked_which_weights_are_meant(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_evaluate(["--config", str(folder / "stage.yaml")]) == 78
    assert "--weights RUN" in capsys.readouterr().err
