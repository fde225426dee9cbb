"""The same command on another number of processes, or another ZeRO stage, goes on with the same numbers (F6)."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
from swinv2_scale.engine.consolidate import SavedTensors
from tests.support.processes import pretrain, run_worker
from tests.support.small_run import LIGHT, metrics, write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

WORLDS = (1, 2, 4)
#: What a checkpoint of two processes at stage 3 in bf16 is restored into, beside itself.
LAYOUTS = ("0 fp32", "1 bf16", "3 bf16_autocast")


class Saved:
    """What each number of processes trained and saved, and what each made of the others' checkpoints."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self.sources = {
            world: self.run(world, f"of-{world} 3 bf16", *(["of-2-at-0 0 bf16", "of-2-at-1 1 fp32"] * (world == 2)))
            for world in WORLDS
        }
        self.restored = {world: self.run(world, *self.cases(world)) for world in WORLDS}

    def cases(self, world: int) -> list[str]:
        cases = [f"{world}-from-{other} 3 bf16 {self.path(other)}" for other in WORLDS]
        if world == 2:
            cases += [f"{layout.replace(' ', '-')} {layout} {self.path(2)}" for layout in LAYOUTS]
            cases.append(f"by-deepspeed 3 bf16 {self.path(2)}")
            cases += [f"3-from-{old} 3 bf16 {old}/step-00000002" for old in ("of-2-at-0", "of-2-at-1")]
        return cases

    def path(self, world: int) -> str:
        found: str = self.sources[world][f"of-{world} 3 bf16"]["checkpoint"]
        return found

    def run(self, world: int, *cases: str) -> dict[str, Any]:
        output = run_worker("elastic.py", self.config, self.folder, *cases, processes=world).output
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        parsed: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return parsed

    def tensors(self, path: str) -> SavedTensors:
        return SavedTensors(open_run_or_checkpoint(self.folder / path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Saved:
    folder = tmp_path_factory.mktemp("elastic")
    config = write_config(folder, shards, **{"depths: [2, 2]": "depths: [1, 1]"})
    return Saved(folder, config)


def assert_same(ours: SavedTensors, theirs: SavedTensors) -> None:
    assert ours.kinds == theirs.kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert ours.num_updates == theirs.num_updates == 2
    assert ours.shapes == theirs.shapes
    for name, kind in product(ours.shapes, ours.kinds):
        assert torch.equal(ours.tensor(name, kind), theirs.tensor(name, kind)), (name, kind)


@pytest.mark.parametrize(("old", "new"), list(product(WORLDS, WORLDS)))
def test_f06_masters_moments_and_average_are_the_same_bits_on_any_number_of_processes(
    saved: Saved, old: int, new: int
) -> None:
    restored = saved.restored[new][f"{new}-from-{old} 3 bf16 {saved.path(old)}"]
    assert_same(saved.tensors(restored["checkpoint"]), saved.tensors(saved.path(old)))


@pytest.mark.parametrize(("old", "new"), list(product(WORLDS, WORLDS)))
def test_f06_the_next_step_is_the_one_that_would_have_come(saved: Saved, old: int, new: int) -> None:
    restored = saved.restored[new][f"{new}-from-{old} 3 bf16 {saved.path(old)}"]
    unbroken = saved.sources[old][f"of-{old} 3 bf16"]
    assert restored["data_digest"] == unbroken["data_digest"]
    assert restored["global_steps"] == 3
    if old == new:
        assert restored["loss"] == unbroken["loss"]
        assert restored["grad_norm"] == unbroken["grad_norm"]
    # Every sample's loss is the same; means of them are added in another order, the gradients' in bf16.
    assert restored["loss"] == pytest.approx(unbroken["loss"], rel=1e-6)
    assert restored["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_f06_another_stage_or_precision_holds_the_same_masters(saved: Saved, layout: str) -> None:
    restored = saved.restored[2][f"{layout.replace(' ', '-')} {layout} {saved.path(2)}"]
    assert_same(saved.tensors(restored["checkpoint"]), saved.tensors(saved.path(2)))


@pytest.mark.parametrize("old", ["of-2-at-0", "of-2-at-1"])
def test_f06_stage_3_goes_on_from_other_stages(saved: Saved, old: str) -> None:
    restored = saved.restored[2][f"3-from-{old} 3 bf16 {old}/step-00000002"]
    assert_same(saved.tensors(restored["checkpoint"]), saved.tensors(f"{old}/step-00000002"))


def test_what_is_saved_is_deepspeed_s_own_checkpoint_which_its_own_loader_takes(saved: Saved) -> None:
    restored = saved.restored[2][f"by-deepspeed 3 bf16 {saved.path(2)}"]
    assert_same(saved.tensors(restored["checkpoint"]), saved.tensors(saved.path(2)))
    assert restored["loss"] == saved.sources[2]["of-2 3 bf16"]["loss"]


def test_f06_the_same_command_on_fewer_processes_goes_on_by_itself(tmp_path: Path, shards: Path) -> None:
    command = ("--config", write_config(tmp_path, shards), "--run-dir", tmp_path / "run", *LIGHT, "optim.total_steps=9")
    first = pretrain(*command, "--steps", 7, "engine.zero_stage=1", processes=2)
    assert first.code == 0, first.output
    second = pretrain(*command)
    assert second.code == 0, second.output
    assert "engine.zero_stage: was 1, now 0 - may change, changes the numbers" in second.output
    assert "written by 2 processes, dealt anew to 1" in second.output
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 10))
    refused = pretrain(*command, "data.micro_batch_size=16", "optim.total_steps=12", processes=2)
    assert refused.code == 78
    assert "global_batch_size 16 is not a multiple of data.micro_batch_size 16 x 2 processes = 32" in refused.output
