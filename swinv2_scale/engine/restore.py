"""From a checkpoint of any number of processes, ZeRO stage and precision into a live engine of any other."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from swinv2_scale import dist
from swinv2_scale.engine import zero
from swinv2_scale.engine.checkpoint import Checkpoint
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.errors import CheckpointError
from swinv2_scale.telemetry.console import log


def load(engine: Any, checkpoint: Checkpoint, samples_per_step: int) -> None:
    """Put weights, float32 masters, moments and average back, to the bit; called by all ranks, on a verified one.

    DeepSpeed's own ``load_checkpoint`` takes the same number of processes and the same stage only, fails on one rank
    alone, and brings settings back that belong to the configuration. Its universal checkpoint writes everything once
    more, in three files a parameter, before it can be read. Here every rank maps the files as DeepSpeed wrote them and
    copies what it will hold; nothing is written, and nothing is loaded before all ranks have opened them.

    Raises:
        CheckpointError: on every rank, if any rank can't read it, or it is of another model.
    """

    def open_own() -> SavedTensors:
        saved = SavedTensors(checkpoint)
        shapes = zero.full_shapes(engine.module)
        if shapes != saved.shapes:
            differing = sorted(n for n in shapes.keys() | saved.shapes if shapes.get(n) != saved.shapes.get(n))
            raise CheckpointError(f"{checkpoint.path} is of another model: it differs in {', '.join(differing[:3])}")
        return saved

    saved = dist.all_agree(open_own, f"loading {checkpoint.path}")
    dist.all_agree(lambda: _fill(engine, saved), f"loading {checkpoint.path}")
    zero.weights_from_masters(engine, saved.tensor)
    engine.global_steps = checkpoint.step
    engine.global_samples = checkpoint.step * samples_per_step
    engine.micro_steps = checkpoint.step * engine.gradient_accumulation_steps()
    if checkpoint.world_size != dist.world_size():
        log().info(
            "written by %d processes, dealt anew to %d: masters, moments and the order of samples are the same",
            checkpoint.world_size,
            dist.world_size(),
        )


@torch.no_grad()
def _fill(engine: Any, saved: SavedTensors) -> None:
    """One master after the other, so that no more than one of those in files is in memory."""
    by_master: dict[int, list[zero.Part]] = defaultdict(list)
    for part in zero.parts(engine):
        by_master[id(part.master)].append(part)
    zero.forget_moments(engine)
    for parts in by_master.values():
        master = parts[0].master
        state = zero.allocate(engine, master) if saved.num_updates else {}
        if state:
            state["step"].fill_(saved.num_updates)
        for kind in ("master", *(key for key in state if key != "step")):
            values = zero.lying(engine, master if kind == "master" else state[kind]).view(-1)
            values.zero_()  # what pads it
            # An average that begins only now begins with the weights.
            source = kind if kind in saved.kinds else "master"
            for part in parts:
                saved.read(part.name, part.first, values[part.start : part.end], source)
