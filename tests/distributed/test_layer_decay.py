"""Layer-wise learning rates in the live engine: the updates of plain AdamW, at every stage and number of ranks."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.inputs import Inputs
from swinv2_scale.engine.optim import learning_rate
from swinv2_scale.models.factory import initialise
from swinv2_scale.tasks.classification import ClassificationTask
from tests.distributed.workers.layer_decay import STEPS
from tests.support.processes import run_worker
from tests.support.small_run import write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

CASES = {
    1: ["0 fp32"],
    2: ["0 fp32", "1 fp32", "2 fp32", "3 fp32", "0 bf16", "3 bf16"],
    3: ["3 fp32"],
}
ALL = [(processes, case) for processes, cases in CASES.items() for case in cases]
SINGLE = [(processes, case) for processes, case in ALL if case.endswith("fp32")]

#: Mixed, erased and dropped samples in micro-batches of two, which one, two and three ranks add up; one held-back
#: sample is left over for any number of ranks. Without clipping every weight moves by its own gradient alone, and with
#: this eps a rounding of a gradient near zero doesn't change the sign of a whole step.
CHANGES = {
    "task:\n  mask_patch_size: 4\n": (
        "task: {name: classification, crop_scale: [0.5, 1.0], mixup: 0.8, cutmix: 1.0, smoothing: 0.1, reprob: 0.5}\n"
    ),
    "window_size: 4\n": "window_size: 4\n  num_classes: 10\n",
    "depths: [2, 2]": "depths: [1, 2]",
    "micro_batch_size: 4": "micro_batch_size: 2",
    "global_batch_size: 16": "global_batch_size: 12",
    "{backend: torch}": "{backend: none}",
    "warmup_steps: 5\n": "warmup_steps: 2\n  layer_decay: 0.8\n  clip_grad_norm: 0\n  eps: 1.0e-4\n",
    "samples: 24": "samples: 23",
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), shards, **CHANGES)


@pytest.fixture(scope="module")
def found(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of a worker by (number of ranks, case)."""

    @cache
    def run(processes: int) -> dict[str, Any]:
        scratch = tmp_path_factory.mktemp("scratch")
        output = run_worker("layer_decay.py", config_path, scratch, *CASES[processes], processes=processes).output
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        parsed: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return parsed

    return lambda processes, case: run(processes)[case]


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """The released numbering, written down once more."""
    name = name.removeprefix("encoder.")
    if name.startswith("patch_embed"):
        return 0
    if found := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name):
        stage = int(found[1])
        return sum(depths[: stage + 1]) if found[2] is None else sum(depths[:stage]) + int(found[2]) + 1
    return sum(depths) + 1


@pytest.fixture(scope="module")
def reference(config_path: Path, shards: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of torch's own AdamW, every parameter a group of its own, whole batches, no DeepSpeed."""
    config = load_config(config_path, ["data.micro_batch_size=12", "data.num_workers=0"]).config
    task = ClassificationTask(config)
    remote = RemoteFiles(config.data.remote)
    inputs = Inputs(config, remote, read_shard_set(f"{shards}/fashion-mnist/train/*.tar"), None)
    model = task.build_model()
    initialise(model, config.seed)
    scales = {
        n: 0.8 ** (1 + sum(config.model.depths) - layer_of(n, config.model.depths)) for n in dict(parameters(model))
    }
    groups = [
        {"params": [p], "weight_decay": 0.05 if p.ndim > 1 and not any(w in n for w in EXEMPT) else 0.0, "name": n}
        for n, p in parameters(model)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optim.betas, eps=config.optim.eps)
    losses = []
    for step, batch in enumerate(inputs.training(task, 0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config) * scales[group["name"]]
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: p.detach() for name, p in parameters(model)}, losses


EXEMPT = ("cpb_mlp", "logit_scale")


def parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


def rate(step: int, config: RunConfig) -> float:
    """Two steps of warm-up, then a cosine over the other 28."""
    top = config.optim.lr
    return top * (step + 1) / 2 if step < 2 else top * (1 + math.cos(math.pi * (step - 2) / 28)) / 2


@pytest.mark.parametrize(("processes", "case"), SINGLE)
def test_updates_are_those_of_plain_adamw_with_a_rate_for_each_parameter(
    found: Any, reference: Any, processes: int, case: str
) -> None:
    weights, losses = reference
    result = found(processes, case)
    # Float32 losses of other batch sizes, added in another order.
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    saved = SavedTensors(open_run_or_checkpoint(Path(result["checkpoint"])))
    assert list(saved.shapes) == list(weights)
    for name, expected in weights.items():
        # A weight has moved by some 3e-3 at most; a wrong rate of its layer would be off by a fifth of its way.
        assert torch.allclose(saved.tensor(name), expected, rtol=1e-5, atol=2e-6), name


def test_weights_of_every_layer_move_further_than_the_tolerance(reference: Any, config_path: Path) -> None:
    """Else the test above couldn't tell rates apart. The position bias has gradients far below eps and may rest."""
    weights, _ = reference
    config = load_config(config_path).config
    model = ClassificationTask(config).build_model()
    initialise(model, config.seed)
    moved = {name: (weights[name] - p.detach()).abs().max().item() for name, p in parameters(model)}
    for layer in range(sum(config.model.depths) + 2):
        of_layer = [way for name, way in moved.items() if layer_of(name, config.model.depths) == layer]
        assert max(of_layer) > 1e-3
        assert sum(way > 2e-5 for way in of_layer) > len(of_layer) / 2


@pytest.mark.parametrize(("processes", "case"), ALL)
def test_every_group_of_the_live_engine_has_its_layers_rate(
    found: Any, config_path: Path, processes: int, case: str
) -> None:
    result = found(processes, case)
    config = load_config(config_path).config
    # Three blocks: layers 0 to 4, each decayed and not; the last step's rate is that of step 2.
    assert learning_rate(2, config.optim) == pytest.approx(rate(2, config))
    expected = {(rate(2, config) * 0.8**above, decay) for above in range(5) for decay in (0.05, 0.0)}
    assert len(result["rates"]) == 10
    ours = {(round(lr, 12), decay) for lr, decay in result["rates"]}
    assert ours == {(round(lr, 12), decay) for lr, decay in expected}
    assert result["rates of AdamW"] == [lr for lr, _ in result["rates"]]


@pytest.mark.parametrize(("processes", "case"), ALL)
def test_a_checkpoint_with_groups_by_layer_gives_every_master_under_its_name(
    found: Any, processes: int, case: str
) -> None:
    """Also into an engine without layers' rates and back, where the groups are two."""
    result = found(processes, case)
    saved = SavedTensors(open_run_or_checkpoint(Path(result["checkpoint"])))
    other = SavedTensors(open_run_or_checkpoint(Path(result["checkpoint without decay"])))
    assert result["groups without decay"] == 2
    assert list(saved.shapes) == list(other.shapes)
    assert saved.kinds == other.kinds == {"master", "exp_avg", "exp_avg_sq"}
    for name in saved.shapes:
        for kind in saved.kinds:
            assert torch.equal(saved.tensor(name, kind), other.tensor(name, kind)), (name, kind)
    assert result["masters"] == result["back again"]


def test_moments_lie_under_the_names_of_their_parameters_at_every_stage(found: Any) -> None:
    one = SavedTensors(open_run_or_checkpoint(Path(found(1, "0 fp32")["checkpoint"])))
    for case in ("1 fp32", "3 fp32"):
        other = SavedTensors(open_run_or_checkpoint(Path(found(2, case)["checkpoint"])))
        for name in one.shapes:
            ours, theirs = other.tensor(name, "exp_avg"), one.tensor(name, "exp_avg")
            # Means of gradients whose parts were added in another order.
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-9, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_finds_the_same_on_any_number_of_ranks(found: Any, precision: str) -> None:
    results = [found(processes, case) for processes, case in ALL if case.endswith(precision)]
    for result in results:
        # The order in which float32 losses are added in float64 is all that differs.
        assert result["sums"] == pytest.approx(results[0]["sums"], rel=1e-12)
        assert sum(result["sums"][4:]) == result["sums"][0] == 23
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-12)
