"""The same training with optimizer states and parameters in several places. Prints one JSON line on rank 0.

Arguments: the configuration, a scratch folder, then one JSON object a case: its "overrides", and the number of the case
whose checkpoint it resumes from in the middle.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine import checkpoint, restore, zero
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.start import begin_again, first_values
from swinv2_scale.engine.step import train_step
from swinv2_scale.tasks.simmim import SimMIMTask

SAVED_AT = 3
#: In the names that DeepSpeed gives to its files.
WORDS = ("exp_avg-", "exp_avg_sq-", "ema-", "gradient", "param")


def main(path: str, scratch: str, *cases: str) -> None:
    dist.start(120)
    results: list[dict[str, Any]] = []
    for number, case in enumerate(map(json.loads, cases)):
        results.append(check(path, Path(scratch), number, case["overrides"], case["resumes"]))
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


def check(path: str, scratch: Path, number: int, overrides: list[str], resumes: int | None) -> dict[str, Any]:
    place = f"engine.offload.nvme_dir={scratch}/swap-{number}"
    config = load_config(path, [*overrides, place, "data.num_workers=0"]).config
    task, folder = SimMIMTask(config), scratch / f"checkpoints-{number}"
    engine = build_engine(config, task, will_load=resumes is not None)
    count = config.data.global_batch_size // config.data.micro_batch_size // dist.world_size()
    batches = [batch for _, batch in zip(range(6 * count), open_inputs(config).training(task, 0, 6), strict=False)]

    def train(step: int, may_step: bool = True) -> Any:
        mine = batches[step * count : (step + 1) * count]
        return train_step(engine, task, mine, 1e-3, lambda loss, grad_norm: may_step).loss

    def publish(step: int) -> str:
        staging = folder / ".part-this-life"
        if dist.rank() == 0:
            staging.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        saver = Saver(engine, folder, staging, CheckpointConfig(keep=2))
        saver.begin(step, {})
        saver.finish()
        saver.close()
        return contents(checkpoint.read(folder / checkpoint.name_of(step)))

    result: dict[str, Any] = {}
    if resumes is None:
        result["first loss"] = train(0)
        train(1, may_step=False)  # refused at the last moment
        train(2)
        result["saved"] = publish(SAVED_AT)
    source = scratch / f"checkpoints-{number if resumes is None else resumes}"
    found = checkpoint.read(source / checkpoint.name_of(SAVED_AT))
    if resumes is not None:
        restore.load(engine, found, config.data.global_batch_size)
        result["saved"] = publish(SAVED_AT)
    result["losses"] = [train(3), train(4)]
    result["end"] = publish(5)
    restore.load(engine, found, config.data.global_batch_size)  # as a rewind does
    result["rewound"] = [train(3), train(4)]
    begin_again(engine, lambda: first_values(engine.module, zero.full_shapes(engine.module), config, None))
    result["loss begun again"] = train(0)
    files = (scratch / f"swap-{number}").rglob(f"rank{dist.rank()}/*.swp")
    result["files"] = sorted({word for path in files for word in WORDS if word in path.name})
    return result


def contents(found: checkpoint.Checkpoint) -> str:
    """A digest of every master, moment and average, whatever wrote them."""
    saved, sha = SavedTensors(found), hashlib.sha256()
    for name in sorted(saved.shapes):
        for which in sorted(saved.kinds):
            sha.update(saved.tensor(name, which).numpy().tobytes())
    return f"{saved.num_updates} {' '.join(sorted(saved.kinds))} {sha.hexdigest()}"


if __name__ == "__main__":
    main(*sys.argv[1:])
