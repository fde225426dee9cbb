"""``init_from``: a run that starts from anyone's weights, under ZeRO-3, at another size, and after they are gone."""

import copy
import shutil
from pathlib import Path

import pytest
import torch

from swinv2_scale.cli.main import main
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.start import open_source
from swinv2_scale.tasks.simmim import SimMIMTask
from swinv2_scale.weights.api import save_weights
from swinv2_scale.weights.read import open_weights
from tests.support.processes import pretrain, run_worker
from tests.support.small_run import write_config

#: So small that no float32 weight moves: what was loaded is still there after a step, and can be compared bit for bit.
STILL = ("optim.lr=1e-30", "data.num_workers=0", "evaluation.samples=8", "logging.panel_every_steps=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards)


@pytest.fixture(scope="module")
def model(config: Path) -> torch.nn.Module:
    """A pre-training model none of whose weights is zero or a bfloat16 number."""
    built = SimMIMTask(load_config(config).config).build_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.05, generator=generator)
            assert not torch.equal(parameter, parameter.bfloat16().float())
    return built


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, config: Path, model: torch.nn.Module) -> Path:
    """A run of two processes, ZeRO-3 in bf16, from a Hugging Face folder; its run directory."""
    folder = tmp_path_factory.mktemp("first")
    save_weights(model, folder / "weights", "hf")
    start = f"init_from={folder / 'weights'}"
    finished = pretrain("--config", config, "--run-dir", folder / "run", "--steps", 1, start, *STILL, processes=2)
    assert finished.code == 0, finished.output
    assert "(Hugging Face): 80 loaded, 0 derived, 0 new, 0 dropped" in finished.output
    return folder / "run"


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, config: Path, first: Path) -> Path:
    """A run of one process that starts from the first, with images and windows twice as large."""
    run = tmp_path_factory.mktemp("second") / "run"
    larger = ("model.image_size=64", "model.window_size=8")
    finished = pretrain("--config", config, "--run-dir", run, "--steps", 1, f"init_from={first}", *larger, *STILL)
    assert finished.code == 0, finished.output
    assert "(swinv2_scale): 80 loaded, 0 derived, 0 new, 0 dropped" in finished.output  # every key accounted for
    return run


def masters(run: Path) -> dict[str, torch.Tensor]:
    weights = open_source(run)
    return {name: weights.tensor(name) for name in weights.metas}


def assert_holds(run: Path, model: torch.nn.Module) -> None:
    found = masters(run)
    wanted = {name.removeprefix("encoder."): parameter for name, parameter in model.named_parameters()}
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_f21_f24_float32_weights_reach_the_masters_of_sharded_bf16_unrounded(
    first: Path, model: torch.nn.Module
) -> None:
    assert_holds(first, model)


def test_a_sharded_run_is_exported_to_hugging_face_with_every_bit_of_its_masters(
    tmp_path: Path, first: Path, model: torch.nn.Module
) -> None:
    assert main(["export", str(first), str(tmp_path / "hf"), "--format", "hf"]) == 0
    exported = open_weights(tmp_path / "hf")
    assert exported.facts.pixel_mean == (0.286,)
    for name, parameter in model.named_parameters():
        assert torch.equal(exported.tensor(name.removeprefix("encoder.")), parameter), name


def test_f24_a_run_goes_to_another_size_and_number_of_processes_and_keeps_its_pretrained_windows(
    second: Path, first: Path, model: torch.nn.Module
) -> None:
    assert_holds(second, model)
    text = (second / "config.yaml").read_text()
    assert f"pretrained_window_sizes: [4, 4]  # inherited from {first}" in text
    assert open_source(second).config().pretrained_window_sizes == (4, 4)


def test_a_run_goes_on_without_the_weights_it_started_from(tmp_path: Path, config: Path, second: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(second, run)
    # The run's own windows, written another way; and weights that are nowhere, which nobody reads any more.
    arguments = ("model.image_size=64", "model.window_size=8", "model.pretrained_window_sizes=[4, [4, 4]]", *STILL)
    finished = pretrain("--config", config, "--run-dir", run, "--steps", 2, "init_from=nowhere", *arguments)
    assert finished.code == 0, finished.output
    assert "init_from is not read: this run goes on from its own checkpoint" in finished.output
    assert "resuming from" in finished.output
    assert "pretrained_window_sizes: [4, 4]  # settled when the run began" in (run / "config.yaml").read_text()


def test_ranks_that_would_start_from_other_weights_stop_with_one_error(
    tmp_path: Path, config: Path, model: torch.nn.Module
) -> None:
    """A path that means another file on another node: here each rank is given its own."""
    save_weights(model, tmp_path / "0.safetensors")
    with torch.no_grad():
        changed = copy.deepcopy(model)
        next(changed.parameters()).flatten()[7] += 1
    save_weights(changed, tmp_path / "1.safetensors")
    output = run_worker("settle.py", config, tmp_path, processes=2).output
    assert output.count("holds other weights for ranks [1] than for rank 0") == 2


def test_f24_weights_of_another_width_stop_every_rank_with_one_error(tmp_path: Path, config: Path, first: Path) -> None:
    arguments = ("--run-dir", tmp_path / "run", f"init_from={first}", "model.embed_dim=32", *STILL)
    finished = pretrain("--config", config, *arguments, processes=2)
    assert finished.code == 65
    assert finished.output.count("error:") == 1
    assert "encoder.patch_embed.proj.weight: (16, 1, 4, 4) in the file, (32, 1, 4, 4) in the model" in finished.output
    assert "Traceback" not in finished.output
