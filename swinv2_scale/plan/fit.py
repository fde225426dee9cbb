"""Does a run fit a GPU's memory, and what to change, cheapest first, if it doesn't."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from swinv2_scale.config.run import RunConfig
from swinv2_scale.errors import ConfigError
from swinv2_scale.plan.batch import fitting_micro_batches
from swinv2_scale.plan.machines import Cluster
from swinv2_scale.plan.peak import Activations, activations
from swinv2_scale.plan.zero import Sharding, States, states

#: Beside tensors: CUDA's context and its libraries' work spaces, NCCL's buffers. Assumed.
RESERVED_BYTES = 3 * 2**29
#: What the allocator holds and can't hand out, of all tensors. Assumed.
FRAGMENTATION = 0.05
_SMALL_BUCKET = 50_000_000
_ZERO = "engine.deepspeed_overrides.zero_optimization"


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    states: States
    activations: Activations

    @property
    def tensors(self) -> int:
        """The most at once: in backward, with activations, or at the update, without."""
        s = self.states
        backward = s.gradients + s.gathered + s.buckets + self.activations.peak
        # Stage 3's bucket stays; what it had gathered and the others' buckets are gone by then.
        update = s.gradients + s.update + (s.buckets if s.gathered else 0)
        return s.static + max(backward, update)

    @property
    def total(self) -> int:
        """With what isn't tensors."""
        return round(self.tensors * (1 + FRAGMENTATION)) + RESERVED_BYTES


@dataclass(frozen=True)
class Change:
    """One thing to set otherwise.

    Attributes:
        overrides: keys and values for the command line; empty for more GPUs.
        price: what it costs, in words.
        total: of memory, with this change and those before it.
    """

    overrides: tuple[str, ...]
    gpus: int
    price: str
    total: int


def memory(config: RunConfig, gpus: int) -> Memory:
    """What each GPU holds.

    Raises:
        ConfigError: the global batch can't be dealt to so many GPUs.
    """
    return Memory(states(Sharding.of(config, gpus)), activations(config))


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The same configuration with other values at some dotted keys."""
    for key, value in settings.items():
        path = key.split(".")
        config = _with(config, path, value)
    return config


def ways_to_fit(config: RunConfig, cluster: Cluster) -> list[Change]:
    """Changes, cheapest first, each on top of those before it, up to the first that fits; none if it fits already.

    Those that save nothing here are passed over. The last one may not fit: then nothing here does.
    """
    limit, gpus = cluster.device.memory_bytes, cluster.gpus
    best = memory(config, gpus).total
    changes: list[Change] = []
    for settings, price in _candidates(config):
        if best <= limit:
            return changes
        attempt = changed(config, settings)
        total = memory(attempt, gpus).total
        if total < best:
            best, config = total, attempt
            changes.append(Change(tuple(f"{k}={_word(v)}" for k, v in settings.items()), gpus, price, total))
    while best > limit and config.engine.zero_stage and (more := _more_gpus(config, gpus)):
        before, best, gpus = best, memory(config, more).total, more
        changes.append(Change((), gpus, "more GPUs for the same batch, so more to wait for each other", best))
        if best > 0.95 * before:
            break  # what is left is not in the states
    if best > limit:
        for key, price in (
            ("engine.offload.optimizer_states", "AdamW on the host's processors, over PCIe each step"),
            ("engine.offload.parameters", "weights over PCIe for every micro-batch"),
        ):
            if best > limit and (key.endswith("states") or config.engine.zero_stage == 3):
                config = changed(config, {key: "cpu"})
                best = memory(config, gpus).total
                changes.append(Change((f"{key}=cpu",), gpus, price, best))
    return changes


def largest_micro_batch(config: RunConfig, cluster: Cluster) -> int | None:
    """The largest ``data.micro_batch_size`` that deals the global batch and fits; None if none does."""
    sizes = fitting_micro_batches(config, cluster.gpus)
    limit = cluster.device.memory_bytes
    # Memory grows with the size: the number of those that fit is found by halving.
    fitting = bisect_right(
        sizes,
        limit,
        key=lambda size: memory(changed(config, {"data.micro_batch_size": size}), cluster.gpus).total,
    )
    return sizes[fitting - 1] if fitting else None


def _candidates(config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    engine = config.engine
    if engine.reduce_bucket_elements > _SMALL_BUCKET:
        yield {"engine.reduce_bucket_elements": _SMALL_BUCKET}, "more, smaller exchanges"
    if engine.activation_checkpointing.backend == "none":
        yield {"engine.activation_checkpointing.backend": "torch"}, "a third more arithmetic"
    if set(config.model.stage_backends) != {"sequential"}:
        yield {"model.attention.backend": "sequential"}, "scores are computed twice"
    if engine.zero_stage < 2:
        yield {"engine.zero_stage": 2}, "gradients are exchanged after every micro-batch"
    if engine.zero_stage < 3:
        yield {"engine.zero_stage": 3}, "weights are gathered for every micro-batch"
    if engine.max_live_elements > _SMALL_BUCKET:
        settings: dict[str, Any] = {"engine.max_live_elements": 2 * _SMALL_BUCKET}
        settings["engine.prefetch_bucket_elements"] = min(engine.prefetch_bucket_elements, _SMALL_BUCKET)
        settings[f"{_ZERO}.stage3_max_reuse_distance"] = 2 * _SMALL_BUCKET
        yield settings, "weights are gathered twice for every micro-batch"
    size = config.data.micro_batch_size
    while size > 1:
        size = max(n for n in range(1, size) if config.data.micro_batch_size % n == 0)
        yield {"data.micro_batch_size": size}, "more micro-batches a step, each less efficient"


def _more_gpus(config: RunConfig, gpus: int) -> int | None:
    """The next larger number of GPUs that the batch can be dealt to."""
    per_round = config.data.global_batch_size // config.data.micro_batch_size
    return next((n for n in range(2 * gpus, per_round + 1) if per_round % n == 0), None)


def _with(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(section, dict):  # deepspeed_overrides
        return {**section, name: _with(section.get(name, {}), rest, value) if rest else value}
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})


def _word(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) else str(value)


def unfit(config: RunConfig, cluster: Cluster) -> ConfigError | None:
    """What the configuration itself says about the cluster, if that isn't this one."""
    asked = config.cluster
    if asked.world_size not in (None, cluster.gpus):
        return ConfigError(
            f"cluster.world_size is {asked.world_size}, the plan is for {cluster.gpus} GPUs",
            f"--gpus {asked.world_size}, or cluster.world_size={cluster.gpus}",
        )
    if asked.num_nodes not in (None, cluster.nodes):
        return ConfigError(
            f"cluster.num_nodes is {asked.num_nodes}, the plan is for {cluster.nodes} nodes",
            f"--nodes {asked.num_nodes}, or cluster.num_nodes={cluster.nodes}",
        )
    return None
