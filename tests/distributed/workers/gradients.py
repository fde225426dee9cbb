"""Losses and gradients of two updates for several ways to compute the same thing. One JSON line on rank 0.

Arguments: the configuration, then one JSON list of overrides for each way; then each way's in turn are compared with
the first: the largest difference of any gradient, relative to the largest entry of that gradient.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.inputs import open_inputs
from swinv2_scale.engine.job import build_engine
from swinv2_scale.tasks.simmim import SimMIMTask


def main(path: str, *ways: str) -> None:
    dist.start(240)
    results = []
    reference: list[Any] = []
    for way in ways:
        found = updates(path, json.loads(way))
        reference = reference or found
        differences = [
            max(relative(ours[name], theirs[name]) for name in theirs)
            for (_, ours), (_, theirs) in zip(found, reference, strict=True)
        ]
        results.append({"losses": [loss for loss, _ in found], "differences": differences, "count": len(found[0][1])})
    if dist.rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.stop()


def updates(path: str, overrides: list[str]) -> list[tuple[float, dict[str, Tensor]]]:
    from deepspeed.utils import safe_get_full_grad

    config = load_config(path, [*overrides, "data.num_workers=0"]).config
    task = SimMIMTask(config)
    engine = build_engine(config, task)
    batches = open_inputs(config).training(task, 0, 2)
    found = []
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    for batch in batches:
        loss = task.loss(engine, batch)
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step()
        found.append((loss.item(), gradients))
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """At the first update most weights have a zero gradient: the norms after the branches start at zero."""
    scale = theirs.abs().max()
    difference = (ours - theirs).abs().max()
    return float(difference / scale) if scale > 0 else float(torch.where(difference == 0, 0.0, torch.inf))


if __name__ == "__main__":
    main(*sys.argv[1:])
