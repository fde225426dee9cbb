"""What a GPU's allocator would count, on any device: bytes of storages that are alive, now and at most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts storages that operations make while it is entered, until they are freed; works on the meta device too.

    Args:
        known: tensors that are there already, and aren't counted.

    Attributes:
        bytes: alive now.
        peak: the most that were alive at once.
        sent: bytes of each collective, by (name, element type), as the tensors handed to it have.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self.sent: Counter[tuple[str, str]] = Counter()
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("c10d."):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            if tensors:
                whole = max(tensors, key=lambda t: t.nbytes)  # of a gather: what all parts together make
                self.sent[name.split(".")[1], str(whole.dtype).removeprefix("torch.")] += whole.nbytes
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._alive.pop(key, 0)


def made_by(build: Any, known: Iterable[Tensor]) -> tuple[Any, LiveMemory]:
    """What a function returns, and the memory that it has made (still counting what is alive of it)."""
    memory = LiveMemory(known)
    with memory:
        result = build()
    return result, memory


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def saved_bytes(build: Any, known: Iterable[Tensor]) -> int:
    """Bytes of storages that autograd saves while a function runs, each once, those of ``known`` left out."""
    left_out = {tensor.untyped_storage()._cdata for tensor in known}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build()
    return sum(storage.nbytes() for storage in found.values())
