"""What live engines hold and send, for comparison with the plan. Prints one JSON line on rank 0.

Arguments: the configuration, a scratch folder, then one case each: overrides, separated by blanks.
"""

import json
import sys
from pathlib import Path
from typing import Any

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine import checkpoint, zero
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.step import train_step
from swinv2_scale.tasks.simmim import SimMIMTask
from tests.support.live_memory import LiveMemory, storages


def main(path: str, scratch: str, *cases: str) -> None:
    dist.start(120)
    results = [check(path, Path(scratch) / str(number), case.split()) for number, case in enumerate(cases)]
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


def check(path: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    config = load_config(path, ["data.num_workers=0", *overrides]).config
    task = SimMIMTask(config)
    engine = build_engine(config, task)
    count = config.data.global_batch_size // config.data.micro_batch_size // dist.world_size()
    batches = open_inputs(config).training(task, 0, 2)
    for _ in range(2):  # the second one has a trace of which parameters are used when
        with LiveMemory() as memory:
            train_step(engine, task, [next(batches) for _ in range(count)], 1e-3, lambda loss, grad_norm: True)
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    masters = [part.master for part in zero.parts(engine)]
    is_same = masters[0].untyped_storage()._cdata in {w.untyped_storage()._cdata for w in weights}
    state = zero.adamw(engine).state.values()
    sums = getattr(engine.optimizer, "fp32_groups_gradients_flat", None) or [
        getattr(engine.optimizer, "grad_partitions_flat_buffer", masters[0])
    ]
    return {
        "weights": storages(weights),
        "masters": 0 if is_same else storages(masters),
        "moments": storages(value for of in state for key, value in of.items() if key != "step"),
        "gradient sums": storages(sums),
        "sent": {f"{what} {kind}": num_bytes for (what, kind), num_bytes in memory.sent.items()},
        "files": saved(engine, folder),
    }


def saved(engine: Any, folder: Path) -> dict[str, int]:
    """Bytes of DeepSpeed's files of a checkpoint."""
    staging = folder / ".part-this-life"
    if dist.rank() == 0:
        staging.mkdir(parents=True)
    dist.barrier()
    saver = Saver(engine, folder, staging, CheckpointConfig(asynchronous=False, keep=2))
    saver.begin(1, {})
    saver.close()
    return {record.name: record.bytes for record in checkpoint.read(folder / checkpoint.name_of(1)).files}


if __name__ == "__main__":
    main(*sys.argv[1:])
