"""The global random generators of a rank, kept in checkpoints.

Nothing here draws from them (every draw is a function of the seed and the sample, see draws.py); a task of a user's own
may, and goes on as if it had never been stopped, on the same number of processes.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from swinv2_scale.engine.checkpoint import Checkpoint
from swinv2_scale.telemetry.console import log


def file_name(rank: int) -> str:
    return f"random_states_rank_{rank:05d}.pt"


def current() -> dict[str, Any]:
    """Tensors and plain data."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(checkpoint: Checkpoint, rank: int, world_size: int) -> None:
    """Set the generators of this rank to what they were; after everything that draws while a job starts.

    On another number of processes they stay as they are: there is no one rank to go on from.
    """
    path = checkpoint.path / file_name(rank)
    if checkpoint.world_size != world_size:
        log().info("global random generators are not restored: the checkpoint has %d ranks", checkpoint.world_size)
        return
    states = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(states["python"])
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
