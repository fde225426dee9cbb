"""A toy with every awkward kind of parameter, trained two steps and published. Prints one JSON line on rank 0.

Arguments: a folder for the checkpoints, then "STAGE PRECISION" each.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.engine import zero
from swinv2_scale.engine.deepspeed_import import deepspeed
from tests.distributed.workers.stages import master_digest, publish


class Toy(nn.Module):
    """Sizes that few numbers of ranks divide, single values (DeepSpeed takes no scalars), and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.empty(5, 3), requires_grad=False)
        self.embed = nn.Linear(7, 13)
        self.temperature = nn.Parameter(torch.empty(1, 1))
        self.gain = nn.Parameter(torch.empty(1))
        self.frozen_too = nn.Parameter(torch.empty(1), requires_grad=False)
        self.wide = nn.Linear(13, 101)
        self.head = nn.Linear(101, 1, bias=False)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(self.embed(x).relu()) * self.temperature * self.gain
        return self.head(hidden).square().mean() + 0 * (self.frozen.sum() + self.frozen_too.sum())


def ds_config(stage: int, precision: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
    }
    if stage == 3:
        # Groups in several parts, as in a model of billions of parameters; the small ones stay whole on every rank.
        config["zero_optimization"] |= {"sub_group_size": 100, "stage3_param_persistence_threshold": 20}
    if precision == "bf16" and stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def train(stage: int, precision: str, folder: Path) -> dict[str, str]:
    config = ds_config(stage, precision)
    model = zero.build(Toy, config)
    shapes = zero.full_shapes(model)
    random = torch.Generator().manual_seed(5)
    zero.assign(model, [(name, torch.randn(shape, generator=random)) for name, shape in shapes.items()])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if len(shapes[name]) > 1]
    others = [p for name, p in trained.items() if len(shapes[name]) <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    for _ in range(2):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        engine.backward(engine(torch.randn(2, 7, generator=random).to(dtype)))
        engine.step()
    path = publish(engine, folder, 2)
    frozen = [engine.module.frozen, engine.module.frozen_too]
    with deepspeed.zero.GatheredParameters(frozen, enabled=stage == 3):
        frozen_digest = hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in frozen)).hexdigest()
    # Frozen ones have no masters: they are left out of the digest, and have one of their own.
    for name in ("frozen", "frozen_too"):
        delattr(engine.module, name)
    return {"checkpoint": str(path), "masters": master_digest(engine), "frozen": frozen_digest}


def main(folder: str, *cases: str) -> None:
    dist.start(120)
    results = {}
    for case in cases:
        stage, precision = case.split()
        results[case] = train(int(stage), precision, Path(folder) / f"{stage}-{precision}")
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
