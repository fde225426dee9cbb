"""For every ZeRO stage and precision: first weights, a poisoned step, resumption. Prints one JSON line on rank 0.

Arguments: the configuration, a scratch folder, then "STAGE PRECISION" each.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import CheckpointConfig, RunConfig
from swinv2_scale.data.loader import Batch
from swinv2_scale.engine import checkpoint, restore, zero
from swinv2_scale.engine.deepspeed_import import deepspeed
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.start import begin_again, first_values
from swinv2_scale.engine.step import StepResult, train_step
from swinv2_scale.tasks.simmim import SimMIMTask


class PoisonedTask(SimMIMTask):
    """The real task, whose loss or gradient the last rank can spoil."""

    poison = ""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        if not self.poison or dist.rank() != dist.world_size() - 1:
            return loss
        if self.poison == "gradient":  # finite loss, infinite gradient
            return loss + (loss - loss.detach()) * math.inf
        return loss * math.nan if self.poison == "nan loss" else loss + math.inf


def digest(engine: Any) -> str:
    """Of all weights, whole."""
    sha = hashlib.sha256()
    partitioned = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        for _, parameter in sorted(engine.module.named_parameters()):
            sha.update(parameter.detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def master_digest(engine: Any) -> str:
    """Of all float32 masters, whole; the weights themselves where there are no others."""
    from deepspeed.utils import safe_get_full_fp32_param

    # Where DeepSpeed's getters find none.
    stage_zero = {p.name: p.master for p in zero.parts(engine)} if hasattr(engine.optimizer, "fp32_groups") else {}
    sha = hashlib.sha256()
    for name, parameter in sorted(engine.module.named_parameters()):
        if name in stage_zero:
            value = stage_zero[name]
        elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            value = safe_get_full_fp32_param(parameter)
        else:
            value = parameter
        sha.update(value.detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def publish(engine: Any, folder: Path, step: int) -> Path:
    """A checkpoint, as a job saves it, but at once."""
    staging = folder / ".part-this-life"
    if dist.rank() == 0:
        staging.mkdir(parents=True, exist_ok=True)
    saver = Saver(engine, folder, staging, CheckpointConfig(asynchronous=False, keep=2))
    saver.begin(step, {})
    saver.close()
    return folder / checkpoint.name_of(step)


def moment_digest(engine: Any) -> str:
    """Of what this rank's AdamW remembers."""
    sha = hashlib.sha256()
    for _, state in zero.adamw(engine).state.items():
        for _, tensor in sorted(state.items()):
            sha.update(tensor.float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def digests(engine: Any) -> tuple[str, str, str]:
    return digest(engine), master_digest(engine), moment_digest(engine)


def train(engine: Any, task: SimMIMTask, batches: list[Batch], may_step: bool = True) -> StepResult:
    return train_step(engine, task, batches, 1e-3, lambda loss, grad_norm: may_step)


def main(path: str, scratch: str, *cases: str) -> None:
    results = {}
    dist.start(120)
    for case in cases:
        stage, precision = case.split()
        results[case] = check(path, Path(scratch), int(stage), precision)
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


def check(path: str, scratch: Path, stage: int, precision: str) -> dict[str, Any]:
    overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "data.num_workers=0"]
    config = load_config(path, overrides).config
    task = PoisonedTask(config)
    engine = build_engine(config, task)
    result: dict[str, Any] = {"initial": digest(engine), "initial masters": master_digest(engine)}
    inputs = open_inputs(config)
    steps = micro_batches(config, inputs.training(task, 0, 6))
    first = next(steps)
    losses = [train(engine, task, first)]
    before = digests(engine)
    poisons = ("nan loss", "infinite loss", "gradient")
    for task.poison in poisons:
        result[task.poison] = train(engine, task, next(steps)).is_applied
    result["unchanged"] = before == digests(engine)
    task.poison = ""
    result["refused"] = train(engine, task, first, may_step=False).is_applied
    result["unchanged by a refused one"] = before == digests(engine)
    folder = scratch / f"{stage}-{precision}"
    result["published masters"] = master_digest(engine)
    result["checkpoint"] = str(publish(engine, folder, 4))
    rest = [next(steps) for _ in range(2)]
    losses += [train(engine, task, batches) for batches in rest]
    result["losses"] = [(step.loss, step.grad_norm, step.is_applied) for step in losses]

    resumed = build_engine(config, task)
    found = checkpoint.newest_verified(folder)
    assert found is not None
    restore.load(resumed, found, config.data.global_batch_size)
    steps = micro_batches(config, inputs.training(task, 4 * config.data.global_batch_size, 2))
    again = [train(resumed, task, next(steps)) for _ in range(2)]
    result["resumed"] = [(step.loss, step.grad_norm, step.is_applied) for step in again]
    end = digests(engine)
    result["same end"] = end[:2] == digests(resumed)[:2]

    restore.load(engine, found, config.data.global_batch_size)  # into the live engine, as a rewind does
    again = [train(engine, task, batches) for batches in rest]
    result["rewound"] = [(step.loss, step.grad_norm, step.is_applied) for step in again]
    result["same end after a rewind"] = end == digests(engine)
    begin_again(engine, lambda: first_values(engine.module, zero.full_shapes(engine.module), config, None))
    result["begun again"] = [digest(engine), master_digest(engine)]
    result["same first step"] = (train(engine, task, first).loss, digests(engine)) == (losses[0].loss, before)
    result["unsafe globals"] = sorted(
        {
            name
            for file in found.path.glob("*.pt")
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)
        }
    )
    return result


def micro_batches(config: RunConfig, batches: Any) -> Any:
    count = config.data.global_batch_size // config.data.micro_batch_size // dist.world_size()
    while True:
        yield [next(batches) for _ in range(count)]


if __name__ == "__main__":
    main(*sys.argv[1:])
