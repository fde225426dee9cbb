"""SwinV2-G begins with the same bits however it is sharded."""

import hashlib
from pathlib import Path

import pytest
import torch

from swinv2_scale.config.loader import load_config
from swinv2_scale.models.factory import initialise
from swinv2_scale.tasks.simmim import SimMIMTask
from tests.support.processes import REPOSITORY, run_worker

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system

CONFIG = REPOSITORY / "configs" / "stages" / "giant" / "simmim_192w12.yaml"
#: Everything of G but its width, and all of it sharded: no parameter is small enough to stay whole.
NARROW = (
    "model.embed_dim=16",
    "model.num_heads=[1, 2, 4, 8]",
    "data.global_batch_size=3",
    "data.micro_batch_size=1",
    "engine.param_persistence_elements=1",
)


@pytest.mark.parametrize("processes", [1, 3])
def test_f21_a_giant_built_under_zero_init_has_the_first_values_of_one_built_plainly(processes: int) -> None:
    output = run_worker("first_values.py", CONFIG, *NARROW, processes=processes).output
    found = next(line for line in output.splitlines() if line.startswith("RESULT ")).split()[1:]
    assert found == plain_digests(CONFIG, processes)


def plain_digests(path: Path, parts: int) -> list[str]:
    """Of a model that was built and initialised without DeepSpeed, cut like ZeRO-3 cuts it: equal parts, rounded up."""
    config = load_config(path, list(NARROW)).config
    model = SimMIMTask(config).build_model()
    initialise(model, config.seed)
    digests = [hashlib.sha256() for _ in range(parts)]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().to(torch.bfloat16).float().flatten()
        size = -(-len(flat) // parts)
        for part, sha in enumerate(digests):
            sha.update(name.encode() + flat[part * size : (part + 1) * size].numpy().tobytes())
    return [sha.hexdigest() for sha in digests]
