"""Train and save, or restore anyone's checkpoint, save it at once and take a step. One JSON line on rank 0.

Arguments: the configuration, a folder, then for each case "NAME STAGE PRECISION [SOURCE]": without a source it trains
two steps and saves as NAME; with one it restores SOURCE first, as NAME "by-deepspeed" by DeepSpeed's own loader.
"""

import json
import sys
from pathlib import Path
from typing import Any

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine import checkpoint, restore
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.step import train_step
from swinv2_scale.tasks.simmim import SimMIMTask
from tests.distributed.workers.stages import micro_batches, publish

STEPS = 2


def run(path: str, folder: Path, name: str, stage: str, precision: str, source: str | None = None) -> dict[str, Any]:
    overrides = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "data.num_workers=0"]
    config = load_config(path, [*overrides, "optim.ema_decay=0.9"]).config
    task = SimMIMTask(config)
    engine = build_engine(config, task, will_load=source is not None)
    position = STEPS * config.data.global_batch_size if source else 0
    steps = micro_batches(config, open_inputs(config).training(task, position, STEPS + 1))
    if source and name == "by-deepspeed":
        saved = folder / source
        assert engine.load_checkpoint(str(saved.parent), tag=saved.name)[0]
    elif source:
        restore.load(engine, checkpoint.read(folder / source), config.data.global_batch_size)
    else:
        for _ in range(STEPS):
            train_step(engine, task, next(steps), 1e-2, lambda loss, grad_norm: True)
    path_of_save = publish(engine, folder / name, STEPS)
    after = train_step(engine, task, next(steps), 1e-2, lambda loss, grad_norm: True)
    return {
        "checkpoint": str(path_of_save.relative_to(folder)),
        "loss": after.loss,
        "grad_norm": after.grad_norm,
        "data_digest": after.data_digest,
        "global_steps": engine.global_steps,
    }


def main(path: str, folder: str, *cases: str) -> None:
    dist.start(120)
    results = {case: run(path, Path(folder), *case.split()) for case in cases}
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
