"""Fine-tuning in real jobs of two ranks: from a pre-training run on, stopped and gone on with, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from swinv2_scale.cli.main import main
from swinv2_scale.config.tasks import CropRule
from swinv2_scale.data.sources.embedded import _CLASSES as EMBEDDED_CLASSES
from swinv2_scale.engine.checkpoint import find, open_run_or_checkpoint, read_state
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.start import open_source
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.weights.api import load_into
from tests.support.processes import Finished, start
from tests.support.small_run import metrics, write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
SMALL = ("model.depths=[1,2]", "logging.tensorboard=false", "data.num_workers=0", "engine.param_persistence_elements=0")
#: Everything that is drawn: crops, flips, RandAugment, mixing, erasing, drop path.
DRAWN = (
    *("task.name=classification", "task.aa=rand-m9-mstd0.5-inc1", "task.mixup=0.8", "task.cutmix=1.0"),
    *("task.reprob=0.5", "task.recount=2", "task.smoothing=0.1", "model.num_classes=10"),
)
OPTIM = ("optim.layer_decay=0.7", "optim.ema_decay=0.9", "optim.schedule=linear", "optim.total_steps=8")
ENDS = ("checkpoint.every_steps=4", "checkpoint.keep_best=1", "evaluation.every_steps=4", "evaluation.metric=top1")


def run(script: str, config: Path, run_dir: Path, *words: str, processes: int = 2) -> Finished:
    job = start(ROOT / "launch" / script, "--config", config, "--run-dir", run_dir, *words, processes=processes)
    return job.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, folder / "shards")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    found = run("pretrain.py", config, folder, *SMALL, "--steps", "3", "logging.panel_every_steps=0", processes=1)
    assert found.code == 0, found.output
    return folder


def words(pretrained: Path) -> tuple[str, ...]:
    return (*SMALL, *DRAWN, *OPTIM, *ENDS, f"init_from={pretrained}", "model.image_size=48", "model.window_size=6")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, config: Path, pretrained: Path) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    found = run("finetune.py", config, folder, *words(pretrained))
    assert found.code == 0, found.output
    return folder


def test_a_stopped_fine_tuning_goes_on_to_the_last_bit(
    tmp_path: Path, config: Path, pretrained: Path, unbroken: Path
) -> None:
    for steps in ("3", "8"):
        found = run("finetune.py", config, tmp_path / "run", *words(pretrained), "--steps", steps)
        assert found.code == 0, found.output
    assert metrics(tmp_path / "run") == metrics(unbroken)
    checkpoints = [open_run_or_checkpoint(folder) for folder in (tmp_path / "run", unbroken)]
    ours, theirs = map(SavedTensors, checkpoints)
    assert ours.kinds == theirs.kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for name in theirs.shapes:
        for kind in theirs.kinds:
            assert torch.equal(ours.tensor(name, kind), theirs.tensor(name, kind))
    states = [read_state(checkpoint) for checkpoint in checkpoints]
    assert states[0]["best_score"] == states[1]["best_score"] is not None


def test_windows_and_weights_are_carried_along_and_the_head_is_new(pretrained: Path, unbroken: Path) -> None:
    log = (unbroken / "log" / "rank-0.log").read_text()
    assert "new: encoder.head.weight, encoder.head.bias: the file has no head" in log
    assert f"{pretrained} isn't finished: its newest checkpoint is step 3 of 30" in log
    assert "pretrained windows: [4, 4]" in log  # of the pre-training at 32 px, not this run's 6
    state = read_state(open_run_or_checkpoint(unbroken))
    assert state["config"]["model.pretrained_window_sizes"] == [4, 4]
    assert state["labels"][:2] == ["T-shirt/top", "Trouser"]


def test_a_fine_tuning_ends_with_an_accuracy_and_a_confusion_picture(unbroken: Path) -> None:
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_top1" in row] == [4, 8]
    assert 0 <= rows[-1]["validation_top1"] <= rows[-1]["validation_top5"] <= 1
    pictures = {path.name for path in (unbroken / "panels").iterdir()}
    assert {"step-00000008.png", "step-00000008-validation.png"} <= pictures


def test_another_number_of_ranks_trains_on_the_same_samples(
    tmp_path: Path, config: Path, pretrained: Path, unbroken: Path
) -> None:
    found = run("finetune.py", config, tmp_path / "run", *words(pretrained), "--steps", "4", processes=1)
    assert found.code == 0, found.output
    ours, theirs = metrics(tmp_path / "run"), metrics(unbroken)[:4]
    assert [row["data_digest"] for row in ours] == [row["data_digest"] for row in theirs]
    # The same images, labels and draws; sums of bf16 gradients are in another order.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=2e-3)


def test_patience_ends_a_run_that_gets_no_better_and_the_same_command_says_so(
    tmp_path: Path, config: Path, pretrained: Path
) -> None:
    # A learning rate of next to nothing: no validation is better than the first one.
    still = ("optim.lr=1e-30", "optim.warmup_steps=0", "evaluation.every_steps=1", "evaluation.patience=2")
    command = (*SMALL, *DRAWN, *still, "optim.total_steps=20", f"init_from={pretrained}", "checkpoint.every_steps=5")
    first = run("finetune.py", config, tmp_path / "run", *command, processes=1)
    assert first.code == 0, first.output
    assert "done: 3 steps, stopped early: 2 validations in a row weren't better than loss" in first.output
    again = run("finetune.py", config, tmp_path / "run", *command, processes=1)
    assert again.code == 0, again.output
    assert "this run is finished: 3 of 20 steps, stopped early" in again.output
    assert open_run_or_checkpoint(tmp_path / "run").step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.num_classes=7",), "data.train has 10 classes (T-shirt/top, Trouser, Pullover, ..), model.num_classes"),
        (("model.depths=[1,3]",), "is of another model than this"),
        (("task.init_head=keep",), "has no head, the model a head of 10 classes"),
        (("init_from=null",), "has no init_from"),
    ],
    ids=["other classes", "other variant", "no head", "no weights"],
)
def test_what_cannot_be_fine_tuned_is_said_before_training(
    tmp_path: Path, config: Path, pretrained: Path, changes: tuple[str, ...], message: str
) -> None:
    found = run("finetune.py", config, tmp_path / "run", *words(pretrained), *changes, processes=1)
    assert found.code in (65, 78)
    assert message in found.output
    assert "step 1/" not in found.output
    assert found.output.count("error:") == 1


def test_an_evaluation_of_the_run_finds_what_its_own_validation_found(
    tmp_path: Path, config: Path, pretrained: Path, unbroken: Path
) -> None:
    script = ROOT / "launch" / "evaluate.py"
    changes = (*words(pretrained), "evaluation.samples=24", "--best", "--weights", unbroken, "--output", tmp_path)
    found = start(script, "--config", config, *changes, processes=1).wait()
    assert found.code == 0, found.output
    best = min(find(unbroken / "checkpoints"), key=lambda checkpoint: (checkpoint.score, -checkpoint.step))
    report = json.loads((tmp_path / f"step-{best.step:08d}-48px-window6.json").read_text())
    # At stage 3 DeepSpeed replaces F.linear: in bf16 it adds the bias to a product that was rounded already.
    assert report["metrics"]["loss"] == pytest.approx(best.validation_loss, rel=1e-3)
    assert 1 - report["metrics"]["top1"] == pytest.approx(best.score, abs=1.5 / 24)  # one sample of 24
    assert report["pretrained_window_sizes"] == [4, 4]
    assert report["per_class"][0]["name"] == "T-shirt/top"


def test_a_run_predicts_with_its_own_crop_size_windows_and_class_names(
    tmp_path: Path, pretrained: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "image.png")
    command = [str(tmp_path / "image.png"), "--json", "--picture", str(tmp_path / "p.png")]
    assert main(["predict", str(unbroken), *command]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {name for name, _ in found["top"]} <= set(EMBEDDED_CLASSES)
    weights = open_source(unbroken)
    assert weights.facts.crop == CropRule(0.875, "center", "bicubic")
    model = SwinV2(weights.config()).eval()
    load_into(model, weights)
    assert (model.config.image_size, model.config.window_size) == (48, 6)
    picture = Resize(int(48 / 0.875), InterpolationMode.BICUBIC)(Image.open(tmp_path / "image.png"))
    pixels = (np.asarray(CenterCrop(48)(picture), np.float32) / 255 - np.float32(0.286)) / np.float32(0.353)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)[None, None])[0].softmax(0)
    assert [p for _, p in found["top"]] == pytest.approx(wanted.sort(descending=True).values[:5].tolist(), rel=1e-5)
    # What was exported knows the same.
    assert main(["export", str(unbroken), str(tmp_path / "e.safetensors"), "--format", "native"]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "e.safetensors"), *command]) == 0
    assert json.loads(capsys.readouterr().out) == [found]
    assert main(["predict", str(pretrained), *command]) == 65
    assert "launch/finetune.py" in capsys.readouterr().err
