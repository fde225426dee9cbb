"""Checkpoints that can't be consolidated say why; those that can take the memory of one tensor. No engine is needed.

That the values are the right ones is shown on DeepSpeed's own files, in tests/distributed/.
"""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_scale.engine.checkpoint import FileRecord, find, manifest_text, open_run_or_checkpoint, read
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.deepspeed_import import ZeroStageEnum
from swinv2_scale.errors import CheckpointError

WEIGHT = torch.arange(1001.0).reshape(7, 143)  # an odd number: two ranks have to pad
MODEL, OPTIM = "zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def publish(path: Path, files: dict[str, Any], world_size: int) -> Path:
    """Files and a manifest that agrees with them, as publish() leaves a checkpoint."""
    path.mkdir(parents=True)
    records = []
    for name, content in files.items():
        torch.save(content, path / name)
        data = (path / name).read_bytes()
        records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
    (path / "manifest.json").write_text(manifest_text(int(path.name[-8:]), world_size, records))
    return path


def model_states(stage: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "module": {"weight": torch.empty(0)},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{"weight": WEIGHT.shape}],
        "frozen_param_shapes": {},
        "shared_params": {},
        "ds_config": {"zero_optimization": {"stage": stage}},
    }
    return {**usual, **changes}


def two_ranks(weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """What DeepSpeed writes at stage 3: half of every parameter on each rank."""
    weights = weights or {"weight": WEIGHT}
    halves: list[list[torch.Tensor]] = [[], []]
    for value in weights.values():
        size = -(-value.numel() // 2)
        padded = torch.cat([value.flatten(), torch.zeros(2 * size - value.numel())])
        for rank in (0, 1):
            halves[rank].append(padded[rank * size : (rank + 1) * size])
    module = {name: torch.empty(0) for name in weights}
    shapes = {name: value.shape for name, value in weights.items()}
    model = model_states(3, module=module, param_shapes=[shapes])
    optim = [{"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(halves[rank])]}} for rank in (0, 1)]
    return {MODEL: model, MODEL.replace("rank_0", "rank_1", 1): model} | {OPTIM.format(r): optim[r] for r in (0, 1)}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return publish(tmp_path / "run" / "checkpoints" / "step-00000004", two_ranks(), world_size=2)


def test_a_whole_checkpoint_gives_its_values(step: Path) -> None:
    weights = SavedTensors(open_run_or_checkpoint(step))
    assert weights.shapes == {"weight": WEIGHT.shape}
    assert torch.equal(weights.tensor("weight"), WEIGHT)


def test_values_may_be_changed_and_are_read_afresh(step: Path) -> None:
    weights = SavedTensors(read(step))
    weights.tensor("weight").zero_()
    assert torch.equal(weights.tensor("weight"), WEIGHT)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_memory_holds_a_few_tensors_at_most_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    numel = 2**18
    large = {f"weight{i}": torch.full((numel,), float(i)) for i in range(64)}
    path = publish(tmp_path / "step-00000004", two_ranks(large), world_size=2)
    del large
    weights = SavedTensors(read(path))
    before = anonymous_bytes()
    most = 0
    for i, name in enumerate(weights.shapes):
        value = weights.tensor(name)
        most = max(most, anonymous_bytes() - before)
        assert (value[0], value[-1]) == (i, i)
        del value
    # 64 tensors of 1 MiB. The allocator keeps some freed ones, up to four were seen; a second copy would be 64.
    assert most < 16 * 4 * numel


# Damage


@pytest.mark.parametrize("name", [MODEL, OPTIM.format(0), OPTIM.format(1)])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "its manifest says"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot read"),
    ],
    ids=["missing", "cut", "zeros"],
)
def test_a_damaged_file_is_named(step: Path, name: str, damage: Callable[[Path], object], says: str) -> None:
    damage(step / name)
    with pytest.raises(CheckpointError, match=says) as caught:
        SavedTensors(read(step))
    assert str(step / name) in caught.value.message
    assert caught.value.next_step
    with pytest.raises(CheckpointError, match=name):
        open_run_or_checkpoint(step)


def test_a_flipped_byte_is_found_before_anything_is_read(step: Path) -> None:
    path = step / OPTIM.format(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"damaged: .*{path.name} has SHA-256"):
        open_run_or_checkpoint(step)


class Smuggled:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", [MODEL, OPTIM.format(1)])
def test_code_in_a_file_does_not_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    files = two_ranks()
    files[name] = {**files[name], "extra": Smuggled(canary)}
    path = publish(tmp_path / "step-00000004", files, world_size=2)
    checkpoint = open_run_or_checkpoint(path)  # its manifest was forged along with it
    with pytest.raises(CheckpointError, match=rf"{name}: it is damaged, or holds more than tensors and plain data"):
        SavedTensors(checkpoint)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Smuggled(canary)))  # noqa: S301  the canary is alive
    assert canary.exists()


# Layouts that we don't know


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files.pop(OPTIM.format(1)), "2 model and 1 optimizer files of 2 ranks at stage 3"),
        (lambda files: files.pop(MODEL), "no model file of rank 0"),
        (lambda files: files[MODEL].pop("ds_config"), "ds_config"),
        (lambda files: files[MODEL].update(shared_params={"a": "weight"}), "share their values"),
        (lambda files: files[MODEL].update(param_shapes=[{"weight": torch.Size([7, 200])}]), "where 700 belong"),
        (lambda files: files[MODEL].update(param_shapes=[{"weight": WEIGHT.shape}] * 2), "zip"),
        (lambda files: files[MODEL]["module"].update(bias=torch.empty(0)), "bias"),
        (lambda files: files.update({OPTIM.format(1): {"optimizer_state_dict": None}}), "fp32_flat_groups|NoneType"),
        (
            lambda files: files[OPTIM.format(1)]["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(3)]),
            r"\[3, 501\] masters on a rank where 501 belong",
        ),
        (
            lambda files: files[OPTIM.format(1)]["optimizer_state_dict"].update(
                fp32_flat_groups=[torch.zeros(501).bfloat16()]
            ),
            "masters of weight in torch.bfloat16",
        ),
    ],
)
def test_an_unknown_layout_is_refused(tmp_path: Path, change: Callable[[Any], object], says: str) -> None:
    files = two_ranks()
    change(files)
    path = publish(tmp_path / "step-00000004", files, world_size=2)
    with pytest.raises(CheckpointError, match=says) as caught:
        SavedTensors(read(path))
    assert str(path) in caught.value.message


def stage_zero(masters: list[list[torch.Tensor]] | None, weight: torch.Tensor) -> dict[str, Any]:
    optimizer = {} if masters is None else {"fp32_groups": masters}
    module = {"a.weight": weight, "b.weight": weight + 1, "a.bias": weight[0]}
    nothing = {"param_shapes": None, "shared_params": None, "frozen_param_shapes": None}
    return {"mp_rank_00_model_states.pt": model_states(0, module=module, optimizer=optimizer, **nothing)}


def test_masters_without_names_are_only_taken_for_the_weights_they_round_to(tmp_path: Path) -> None:
    a, b = torch.rand(4, 4), torch.rand(4, 4)
    files = stage_zero([[a, b], [a[0]]], a.bfloat16())
    files["mp_rank_00_model_states.pt"]["module"]["b.weight"] = b.bfloat16()
    weights = SavedTensors(read(publish(tmp_path / "step-00000004", files, world_size=2)))
    assert torch.equal(weights.tensor("a.weight"), a)
    assert torch.equal(weights.tensor("b.weight"), b)
    assert torch.equal(weights.tensor("a.bias"), a[0])

    files["mp_rank_00_model_states.pt"]["optimizer"]["fp32_groups"] = [[b, a], [a[0]]]
    weights = SavedTensors(read(publish(tmp_path / "step-00000008", files, world_size=2)))
    with pytest.raises(CheckpointError, match=r"a\.weight isn't the one its weight was rounded from"):
        weights.tensor("a.weight")


@pytest.mark.parametrize("masters", [None, [[WEIGHT, WEIGHT]], [[WEIGHT], [WEIGHT, WEIGHT]]])
def test_bf16_weights_without_a_master_each_are_refused(
    tmp_path: Path, masters: list[list[torch.Tensor]] | None
) -> None:
    path = publish(tmp_path / "step-00000004", stage_zero(masters, WEIGHT.bfloat16()), world_size=2)
    with pytest.raises(CheckpointError, match=r"masters of a\.weight in torch\.bfloat16|parameter groups of"):
        SavedTensors(read(path))


# What a path means


def test_a_run_means_its_newest_whole_checkpoint(step: Path) -> None:
    newer = publish(step.with_name("step-00000008"), two_ranks(), world_size=2)
    for path in (newer.parent, newer.parent.parent):
        assert open_run_or_checkpoint(path).path == newer
    (newer / MODEL).unlink()
    for path in (newer.parent, newer.parent.parent):
        assert open_run_or_checkpoint(path).path == step
    (step / MODEL).unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        open_run_or_checkpoint(step.parent)
    assert len(find(step.parent)) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "holds no whole checkpoint, it holds nothing"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "checkpoints holds no whole checkpoint, it holds no"),
        (lambda path: (path / "photos").mkdir(parents=True), "it holds photos"),
        (lambda path: (path / "checkpoints" / ".part-step-00000004").mkdir(parents=True), "holds .part-step-00000004"),
        (lambda path: [(path / f"{n:02}").mkdir(parents=True) for n in range(12)], "06, 07 and 4 more"),
    ],
)
def test_a_path_without_a_checkpoint_says_what_is_there(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / "run")
    with pytest.raises(CheckpointError, match=says) as caught:
        open_run_or_checkpoint(tmp_path / "run")
    assert "run directory" in caught.value.next_step


@pytest.mark.parametrize("text", ['{"step": 4, "fil', '{"step": 4}', "[]"])
def test_a_torn_manifest_is_no_checkpoint(step: Path, text: str) -> None:
    (step / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        open_run_or_checkpoint(step)


def test_a_stage_is_saved_as_a_number_by_every_python() -> None:
    # Python 3.11.0 to 3.11.3 pickle other enums as a call of getattr, which no checkpoint of ours may hold.
    assert ZeroStageEnum.weights.__reduce_ex__(2) == (ZeroStageEnum, (3,))
