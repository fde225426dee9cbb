"""Models whose parameters may be partitioned: build them, know their true shapes, write values into them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.engine.adamw import AdamW
from swinv2_scale.engine.deepspeed_import import deepspeed


def build(build_model: Callable[[], nn.Module], ds_config: dict[str, Any]) -> nn.Module:
    """Build a model, at ZeRO stage 3 with every parameter partitioned as soon as it is made.

    The values are undefined: ``zero.Init`` silently drops what constructors write, so nothing relies on them.
    """
    if ds_config["zero_optimization"]["stage"] < 3:
        with dist.device():
            return build_model()
    deepspeed.init_distributed()  # wraps the group of dist.start(); zero.Init takes the world size from it
    # No dtype= here: zero.Init 0.19.8 reads `dtype or fp16 if supported else bf16`, which makes float32 into bfloat16
    # on a CPU. It takes the right type from the configuration.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        return build_model()


def full_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every parameter, also where this rank holds a part of it."""
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


@torch.no_grad()
def assign(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole float32 values into parameters, rounded to their type, one at a time.

    Before ``deepspeed.initialize``. Every rank hands in the same values.
    """
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        is_partitioned = hasattr(parameter, "ds_id")
        # modifier_rank=0: without it the write is dropped, again silently.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=is_partitioned):
            if not is_partitioned or dist.rank() == 0:
                parameter.copy_(value)


@dataclass(frozen=True)
class Part:
    """What this rank holds of a parameter's master: values ``first`` to ``first + numel`` of it, flattened, are the
    values of ``master``, flattened, from ``start`` on."""

    name: str
    master: Tensor  # what AdamW steps on; without values while they lie in a file, see lying()
    start: int
    first: int
    numel: int

    @property
    def end(self) -> int:
        return self.start + self.numel


def parts(engine: Any) -> list[Part]:
    """What this rank holds of every trained parameter, at any stage and precision.

    After ``deepspeed.initialize``. The parts of all ranks together are every master once (at stage 0: once a rank).
    """
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    found: list[Part] = []
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3: a W-th of every parameter, the last one padded
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()  # ds_tensor is empty where parameters lie in files
                first = min(size * dist.rank(), parameter.ds_numel)
                found.append(Part(names[parameter], flat, start, first, min(size, parameter.ds_numel - first)))
                start += size
    elif groups := _groups_with_flat_parts(optimizer):  # stages 1, 2: a W-th of every group
        for group, flat in groups:
            for parameter in group:
                if parameter._hp_mapping is not None:
                    there, here = parameter._hp_mapping.get_hp_fragment_address(), parameter._hp_mapping
                    first = here.lp_fragment_address.start
                    found.append(Part(names[parameter], flat, there.start, first, there.numel))
    elif hasattr(optimizer, "fp32_groups"):  # stage 0 in bf16: lists beside the weights
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            found += [Part(names[w], m, 0, 0, m.numel()) for w, m in zip(weights, masters, strict=True)]
    else:  # stage 0 in float32: the weights themselves
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        found += [Part(names[p], p, 0, 0, p.numel()) for p in masters]
    return found


def _groups_with_flat_parts(optimizer: Any) -> list[tuple[list[Any], Tensor]]:
    """Of stages 1 and 2; stage 1 in bf16 is a class of its own in DeepSpeed."""
    for weights, masters in (
        ("bit16_groups", "single_partition_of_fp32_groups"),
        ("bf16_groups", "fp32_groups_flat_partition"),
    ):
        if hasattr(optimizer, masters):
            return list(zip(getattr(optimizer, weights), getattr(optimizer, masters), strict=True))
    return []


def adamw(engine: Any) -> AdamW:
    """Our optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, AdamW) else optimizer.optimizer


def lying(engine: Any, tensor: Tensor) -> Tensor:
    """The values of a master, a moment or an average wherever they lie: itself, or its swap file mapped, to be read
    and written through. Let go of it before the next update.
    """
    for info in _swapped(engine):
        for context in info.tensors:
            if context.compute_tensor is tensor:
                return _mapped(info, context)
    return tensor


def swapped_files(engine: Any) -> dict[int, Tensor]:
    """All tensors of the optimizer that lie in files now, mapped, by the id() of what stands for them."""
    return {id(context.compute_tensor): _mapped(info, context) for info in _swapped(engine) for context in info.tensors}


def allocate(engine: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a master, zeros where it had none, in a file where the master is."""
    state = adamw(engine).allocate(master)
    for info in _swapped(engine):
        if info.tensors[0].compute_tensor is master and not info.has_state_tensors:
            tensors = [state[key] for key in adamw(engine).state_keys]
            for key, tensor in zip(adamw(engine).state_keys, tensors, strict=True):
                tensor.ds_id = f"{key}-{info.param_id}"  # type: ignore[attr-defined]  # as its swapper names the file
            info.add_state_tensors(tensors)
            length = os.stat(info.tensors[0].swap_path).st_size
            for context in info.tensors[1:]:
                with open(context.swap_path, "wb") as file:
                    file.truncate(length)
    return state


def forget_moments(engine: Any) -> None:
    """AdamW remembers nothing, as before the first update."""
    adamw(engine).state.clear()
    if swapper := getattr(engine.optimizer, "optimizer_swapper", None):
        swapper.purge_state()


def _swapped(engine: Any) -> list[Any]:
    """What DeepSpeed knows of each flat part whose master and moments are in files between updates."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return list(swapper.swap_params_info.values()) if swapper else []


def _mapped(info: Any, context: Any) -> Tensor:
    return torch.from_file(context.swap_path, shared=True, size=info.numel(), dtype=info.dtype())


@torch.no_grad()
def assign_masters(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole float32 values into the float32 masters of a bf16 engine, unrounded.

    After ``deepspeed.initialize``, which makes the masters out of the bf16-rounded weights.
    """
    by_name: dict[str, list[Part]] = defaultdict(list)
    for part in parts(engine):
        by_name[part.name].append(part)
    for name, value in values:
        for part in by_name[name]:
            master = lying(engine, part.master).view(-1)
            master[part.start : part.end].copy_(value.flatten().narrow(0, part.first, part.numel))


@torch.no_grad()
def weights_from_masters(engine: Any, whole: Callable[[str], Tensor]) -> None:
    """Make the weights of a live engine what their masters say, rounded to their type. Called by all ranks.

    Args:
        whole: a parameter's whole float32 value by name; at stage 3 asked for frozen parameters alone, which have no
            masters.
    """
    optimizer = engine.optimizer
    is_partitioned = hasattr(optimizer, "fp32_partitioned_groups_flat")
    trained = {id(p) for group in optimizer.fp16_groups for p in group} if is_partitioned else set()
    for name, parameter in engine.module.named_parameters():
        if not is_partitioned:
            parameter.copy_(whole(name))
        elif id(parameter) not in trained:
            assign(engine.module, [(name, whole(name))])
    if is_partitioned:
        # As DeepSpeed does after every update; parameters that stay whole on every rank are gathered again.
        optimizer.checkpoint_event_prologue()
        for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            empty, master.data = master.data, lying(engine, master)
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
            master.data = empty
        optimizer.checkpoint_event_epilogue()
