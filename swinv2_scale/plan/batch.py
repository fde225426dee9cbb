"""How a global batch is dealt to processes."""

from __future__ import annotations

from swinv2_scale.config.run import RunConfig
from swinv2_scale.errors import ConfigError
from swinv2_scale.geometry import nearest_multiples


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank in a step.

    Raises:
        ConfigError: the global batch can't be dealt to so many ranks.
    """
    data = config.data
    per_round = data.micro_batch_size * world_size
    if data.global_batch_size % per_round:
        fits = fitting_micro_batches(config, world_size)
        lower, upper = nearest_multiples(data.global_batch_size, per_round)
        raise ConfigError(
            f"data.global_batch_size {data.global_batch_size} is not a multiple of data.micro_batch_size "
            f"{data.micro_batch_size} x {world_size} processes = {per_round}; {lower} and {upper} are",
            f"with {world_size} processes these micro-batches fit: {fits}"
            if fits
            else f"make data.global_batch_size a multiple of {world_size}",
        )
    return data.global_batch_size // per_round


def fitting_micro_batches(config: RunConfig, world_size: int) -> list[int]:
    """Every ``data.micro_batch_size`` that deals the global batch evenly."""
    per_rank, rest = divmod(config.data.global_batch_size, world_size)
    return [] if rest else [n for n in range(1, per_rank + 1) if per_rank % n == 0]
