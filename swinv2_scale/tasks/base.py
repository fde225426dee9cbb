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
    #: What classes are called, in the order of labels, for pictures; empty where nobody knows, or there are none.
    labels: tuple[str, ...]

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
        """float64 (N,): whatever the metrics are made of, to be added up over batches and ranks; samples count with
        the batch's ``weight``."""
        ...

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Metrics by name, ``loss`` first, of the sums over a whole data set."""
        ...

    def summary(self, sums: Tensor, title: str) -> Image | None:
        """A picture of an evaluation as a whole, if the task has one."""
        ...

    def panel(self, model: nn.Module, batch: Batch, title: str) -> Image:
        """A picture of what the model does with a batch."""
        ...
