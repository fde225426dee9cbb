"""How large the outputs of the blocks are: where a loss that isn't finite began, and whether deep layers grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.models.backbone import SwinV2


@dataclass(frozen=True)
class Amplitudes:
    """The largest absolute output at each place of the model, on each rank.

    Attributes:
        places: "embedding", then "stage 0 block 0" and so on, in the order of the forward pass.
        by_rank: for each rank a number for each place; NaN or infinity where an output isn't finite.
    """

    places: tuple[str, ...]
    by_rank: tuple[tuple[float, ...], ...]

    @property
    def largest(self) -> dict[str, float]:
        """Over all ranks; NaN counts as larger than anything."""
        columns = zip(*self.by_rank, strict=True)
        return dict(zip(self.places, (max(c, key=lambda v: (math.isnan(v), v)) for c in columns), strict=True))

    @property
    def first_non_finite(self) -> tuple[str, int] | None:
        """(place, rank)."""
        for number, place in enumerate(self.places):
            for rank, values in enumerate(self.by_rank):
                if not math.isfinite(values[number]):
                    return place, rank
        return None

    def __str__(self) -> str:
        groups = groupby(self.largest.items(), key=lambda item: item[0].partition(" block ")[0])
        text = " | ".join(f"{name}: {' '.join(f'{value:.3g}' for _, value in items)}" for name, items in groups)
        first = self.first_non_finite
        return text + ("; all finite" if first is None else f"; first non-finite: {first[0]} on rank {first[1]}")


class AmplitudeMeter:
    """Watches a model's training forward passes, those that really happened: none is repeated to be looked at.

    Costs one pass over the output of each block, which has read and written tens of its size to make it, and no wait
    for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        backbone = next((module for module in model.modules() if isinstance(module, SwinV2)), None)
        watched: dict[str, nn.Module] = {}
        if backbone is not None:
            watched["embedding"] = backbone.patch_embed
            for number, stage in enumerate(backbone.layers):
                blocks = stage.get_submodule("blocks").children()
                watched |= {f"stage {number} block {index}": block for index, block in enumerate(blocks)}
        self._places = tuple(watched)
        self._largest: dict[str, Tensor] = {}
        for place, module in watched.items():
            module.register_forward_hook(partial(self._note, place))

    def clear(self) -> None:
        """A step begins."""
        self._largest.clear()

    def read(self) -> Amplitudes:
        """Of this step's micro-batches; called by all ranks together."""
        own = torch.stack([self._largest[place] for place in self._places]).tolist() if self._places else []
        return Amplitudes(self._places, tuple(tuple(values) for values in dist.gather(own)))

    def _note(self, place: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            return
        tokens = output[0] if isinstance(output, tuple) else output
        # One pass without a copy, and NaN stays NaN; on CPUs 20 times as fast as the infinity norm.
        low, high = torch.aminmax(tokens.detach())
        largest = torch.maximum(-low, high).float()
        known = self._largest.get(place)
        self._largest[place] = largest if known is None else torch.maximum(known, largest)
