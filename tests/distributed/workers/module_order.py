"""Train two steps with a drop path of 0.9; prints which modules each rank called, in their order.

Arguments: the configuration.
"""

import json
import sys
from functools import partial
from typing import Any

from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.engine.step import train_step
from swinv2_scale.models.block import Block
from swinv2_scale.tasks.simmim import SimMIMTask


def main(path: str) -> None:
    dist.start(120)
    config = load_config(path, ["model.drop_path_rate=0.9", "data.num_workers=0"]).config
    task = SimMIMTask(config)
    engine = build_engine(config, task)
    called: list[str] = []
    dropped: list[list[bool]] = []
    for name, module in engine.module.named_modules():
        module.register_forward_pre_hook(partial(note, called, name))
        if isinstance(module, Block):
            module.register_forward_hook(partial(note_dropped, dropped))
    batches = open_inputs(config).training(task, 0, 2)
    count = config.data.global_batch_size // config.data.micro_batch_size // dist.world_size()
    steps = [[next(batches) for _ in range(count)] for _ in range(2)]
    digests = [train_step(engine, task, step, 1e-3, lambda loss, grad_norm: True).loss for step in steps]
    ranks = dist.gather({"called": called, "dropped": dropped, "losses": digests})
    if dist.rank() == 0:
        print("RESULT " + json.dumps(ranks))
    dist.barrier()
    dist.stop()


def note_dropped(dropped: list[list[bool]], module: Any, inputs: Any, output: Tensor) -> None:
    """Which samples a block gave back as they came: both of their branches were dropped."""
    dropped.append((output == inputs[0]).flatten(1).all(1).tolist())


def note(called: list[str], name: str, module: Any, inputs: Any) -> None:
    called.append(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
