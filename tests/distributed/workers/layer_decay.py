"""A classifier with layer-wise learning rates, trained for a few steps at several ZeRO stages. JSON on rank 0.

Arguments: the configuration, a scratch folder, then "STAGE PRECISION" each.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine import checkpoint, restore, zero
from swinv2_scale.engine.evaluate import evaluate
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.optim import learning_rate
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.step import train_step
from swinv2_scale.tasks.classification import ClassificationTask

STEPS = 3


def main(path: str, scratch: str, *cases: str) -> None:
    results = {}
    dist.start(120)
    for case in cases:
        stage, precision = case.split()
        results[case] = trained(path, Path(scratch) / f"{stage}-{precision}", int(stage), precision)
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


def trained(path: str, folder: Path, stage: int, precision: str) -> dict[str, Any]:
    overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "data.num_workers=0"]
    config = load_config(path, overrides).config
    task = ClassificationTask(config)
    engine = build_engine(config, task)
    inputs = open_inputs(config)
    validation, _ = evaluate(engine, task, inputs.held_back(task), "top1")
    result: dict[str, Any] = {"metrics": validation.metrics, "sums": validation.sums.tolist(), "losses": []}
    batches = inputs.training(task, 0, STEPS)
    num_micro = config.data.global_batch_size // config.data.micro_batch_size // dist.world_size()
    for step in range(STEPS):
        lr = learning_rate(step, config.optim)
        taken = train_step(engine, task, [next(batches) for _ in range(num_micro)], lr, lambda loss, norm: True)
        result["losses"].append(taken.loss)
    result["rates"] = [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]
    result["rates of AdamW"] = [group["lr"] for group in zero.adamw(engine).param_groups]
    result["masters"] = digest_of_parts(engine)
    result["checkpoint"] = str(publish(engine, folder))

    # With one rate for all there are two groups: the same masters lie elsewhere.
    flat = load_config(path, [*overrides, "optim.layer_decay=1.0"]).config
    other = build_engine(flat, task)
    found = checkpoint.newest_verified(folder)
    assert found is not None
    restore.load(other, found, flat.data.global_batch_size)
    result["groups without decay"] = len(other.optimizer.param_groups)
    again = publish(other, folder.with_name(folder.name + "-flat"))
    result["checkpoint without decay"] = str(again)
    back = build_engine(config, task)
    restore.load(back, checkpoint.read(again), config.data.global_batch_size)
    result["back again"] = digest_of_parts(back)
    return result


@torch.no_grad()
def digest_of_parts(engine: Any) -> str:
    """Of what this rank's AdamW steps on, by name."""
    parts = sorted(zero.parts(engine), key=lambda part: (part.name, part.first))
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.name.encode())
        sha.update(part.master.view(-1)[part.start : part.end].contiguous().numpy().tobytes())
    return sha.hexdigest()


def publish(engine: Any, folder: Path) -> Path:
    staging = folder / ".part-this-life"
    if dist.rank() == 0:
        staging.mkdir(parents=True, exist_ok=True)
    saver = Saver(engine, folder, staging, CheckpointConfig(asynchronous=False, keep=2))
    saver.begin(STEPS, {})
    saver.close()
    return folder / checkpoint.name_of(STEPS)


if __name__ == "__main__":
    main(*sys.argv[1:])
