"""What the training loop needs from a task; a new task is one module with one class of this shape."""

from __future__ import annotations

from typing import Protocol

from PIL.Image import Image
from torch import Tensor, nn

from swinv2_scale.data.loader import Batch, Sample
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.draws import Draw


class Task(Protocol):
    """One kind of training. ``model`` below is the DeepSpeed engine around what ``build_model`` returned."""

    #: What the arrays of one sample take, at most; the loader's memory is planned with it.
    sample_bytes: int

    def build_model(self) -> nn.Module:
        """The module with its loss inside, parameters uninitialised; called under ``zero.Init`` at stage 3."""
        ...

    def training_sample(self, record: Record, draw: Draw) -> Sample:
        """Decode and augment; every random number from ``draw``."""
        ...

    def evaluation_sample(self, record: Record, draw: Draw) -> Sample:
        """Decode without augmentation."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar float32: the mean over the samples of the batch."""
        ...

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """float64 (2,): weighted sum of the samples' losses, and the sum of their weights."""
        ...

    def panel(self, model: nn.Module, batch: Batch, title: str) -> Image:
        """A picture of what the model does with a batch."""
        ...
