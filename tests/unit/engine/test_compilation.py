"""model.compile: the same numbers from compiled blocks, and a typed error where nothing can be compiled."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.engine import activation_checkpointing, compilation
from swinv2_scale.errors import ConfigError
from swinv2_scale.models.factory import initialise
from swinv2_scale.tasks.simmim import SimMIM, SimMIMTask
from tests.support.small_run import write_config

torch.set_num_threads(1)


def config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write_config(folder, folder), ["model.compile=true", *overrides]).config


def test_a_missing_compiler_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "some-compiler")
    with pytest.raises(ConfigError, match="there is no some-compiler in PATH"):
        compilation.check(config(tmp_path))
    compilation.check(config(tmp_path, "model.compile=false"))
    (tmp_path / "some-compiler").touch(mode=0o755)
    compilation.check(config(tmp_path))


def test_blocks_that_are_not_to_be_compiled_stay_as_they_are(tmp_path: Path) -> None:
    model = SimMIMTask(config(tmp_path)).build_model()
    assert isinstance(model, SimMIM)
    block = model.encoder.layers[0].get_submodule("blocks.0")
    names = [name for name, _ in model.named_parameters()]
    compilation.apply(model, config(tmp_path, "model.compile=false"))
    assert "attend" not in vars(block)
    compilation.apply(model, config(tmp_path))
    assert "attend" in vars(block)
    assert [name for name, _ in model.named_parameters()] == names


TRAINING = """
import sys
from swinv2_scale.cli.train import pretrain
code = pretrain()
print("torch._dynamo" in sys.modules)
sys.exit(code)
"""


@pytest.mark.system  # three whole starts, each with its own imports
@pytest.mark.parametrize(
    ("stage", "checkpointing", "wanted"), [(1, "none", "False"), (3, "torch", "True"), (3, "none", "False")]
)
def test_a_training_that_compiles_nothing_doesnt_import_torchs_compiler(
    tmp_path: Path, shards: Path, stage: int, checkpointing: str, wanted: str
) -> None:
    """It takes 2 s of the processor in every rank. torch's own activation checkpointing wants it all the same."""
    settings = [f"engine.zero_stage={stage}", f"engine.activation_checkpointing.backend={checkpointing}"]
    words = ["--config", str(write_config(tmp_path, shards)), "--run-dir", str(tmp_path / "run"), "--steps", "1"]
    command = [sys.executable, "-c", TRAINING, *words, *settings]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == wanted


@pytest.mark.system
@pytest.mark.parametrize("backend", ["eager", "sdpa", "sequential"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_compiled_blocks_give_the_numbers_of_uncompiled_ones(tmp_path: Path, precision: str, backend: str) -> None:
    way = (f"engine.precision={precision}", f"model.attention.backend={backend}", "model.depths=[2,1]")
    wanted = gradients(tmp_path, *way, "model.compile=false")
    for checkpointing in ("none", "torch"):
        found = gradients(tmp_path, *way, f"engine.activation_checkpointing.backend={checkpointing}")
        # Float32: other orders of additions. Bfloat16 has 2**-8; compiled code rounds at fewer places.
        tolerance = 1e-4 if precision == "fp32" else 0.1
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert (gradient - wanted[name]).norm() <= tolerance * wanted[name].norm(), name
        again = gradients(tmp_path, *way, f"engine.activation_checkpointing.backend={checkpointing}")
        assert all(torch.equal(again[name], gradient) for name, gradient in found.items())


@pytest.mark.system
def test_compiled_blocks_hold_no_weights_that_zero_3_takes_away_after_forward(tmp_path: Path) -> None:
    run = config(tmp_path, "model.depths=[1,1]", "model.linear=onednn")
    model = SimMIMTask(run).build_model()
    assert isinstance(model, SimMIM)
    initialise(model, 0)
    compilation.apply(model, run)
    block = model.encoder.layers[0].get_submodule("blocks.0")
    weights = {name: p for name, p in block.named_parameters() if p.dim() == 2 and "cpb_mlp" not in name}
    values = {name: p.data.clone() for name, p in weights.items()}
    gathered = {name: weakref.ref(p.data.untyped_storage()) for name, p in weights.items()}
    out = block(torch.randn(2, 64, 16, requires_grad=True), (8, 8))
    for parameter in weights.values():  # as DeepSpeed does it
        parameter.data = torch.empty(0)
    assert [name for name, storage in gathered.items() if storage() is not None] == []
    for name, parameter in weights.items():
        parameter.data = values[name]
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == values[name].shape for name, p in weights.items())


def gradients(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Of one micro-batch, drop path included; and the losses, under a name of their own."""
    run = config(folder, *overrides)
    model = SimMIMTask(run).build_model()
    assert isinstance(model, SimMIM)
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(0.7)
    compilation.apply(model, run)
    activation_checkpointing.apply(model, run.engine.activation_checkpointing)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hidden = torch.arange(64).view(8, 8).expand(4, 8, 8) * 37 % 64 < 39  # 6 of 10
    with torch.autocast("cpu", torch.bfloat16, enabled=run.engine.precision == "bf16_autocast"):
        losses, _ = model(images, hidden, torch.arange(4))
    losses.mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "losses": losses.detach()}
