"""Image classification: one label an image.

Shapes: images (B, C_in, H, W); labels int64 (B,); logits (B, K).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import ClassificationConfig, RandAugment
from swinv2_scale.data.images.augment import rand_augment
from swinv2_scale.data.images.decode import decode_class, evaluation_format, open_image, training_format
from swinv2_scale.data.images.erasing import draw_boxes, erase
from swinv2_scale.data.images.mixing import draw_mixing, mix, soft_targets
from swinv2_scale.data.images.transforms import evaluation_crop, normalised, training_crop
from swinv2_scale.data.loader import Batch, Sample
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.draws import Draw
from swinv2_scale.geometry import Size
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.models.precision import wide_type
from swinv2_scale.tasks.pictures import draw_confusion, draw_gallery, shown

#: Above so many classes an evaluation counts what was right of each class, not what was taken for what.
MAX_CONFUSION_CLASSES = 1000
_NUM_TOTALS = 4  # of the evaluation's sums: weight, loss, top-1, top-5


class Classification(nn.Module):
    """A backbone with its class head, from pixels as they are stored to logits.

    Args:
        config: its sections model, data and task are read.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        task = _section(config)
        self.num_classes, self.smoothing, self.remode = config.model.num_classes, task.smoothing, task.remode
        self.pixel_mean, self.pixel_std = config.data.pixel_mean, config.data.pixel_std
        self.encoder = SwinV2(config.model)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        mixing: Tensor | None = None,
        boxes: Tensor | None = None,
        noise_keys: Tensor | None = None,
        drop_keys: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            images: (B, C_in, H, W) of the configured pixel type.
            labels: int64 (B,); None asks for logits.
            mixing: float32 (B, 6), see data/images/mixing.py.
            boxes: int (B, N, 4), see data/images/erasing.py.
            noise_keys: int64 (B,) that the boxes' noise is drawn from.
            drop_keys: int64 (B,) for drop path; None drops nothing.

        Returns:
            float32: logits (B, K), or each sample's cross-entropy (B,) with smoothed and mixed labels.
        """
        encoder = self.encoder
        assert encoder.head is not None
        pixels = normalised(images, self.pixel_mean, self.pixel_std)
        if boxes is not None and noise_keys is not None:
            pixels = erase(pixels, boxes, noise_keys, self.remode)
        targets = None if labels is None else soft_targets(labels, self.num_classes, self.smoothing)
        if mixing is not None and targets is not None:
            pixels, targets = mix(pixels, targets, mixing)
        tokens, map_size = encoder.patch_embed(pixels.to(encoder.patch_embed.proj.weight.dtype))
        features, _ = encoder.forward_levels(tokens, map_size, drop_keys)[-1]
        logits: Tensor = encoder.head(encoder.norm(features).mean(1))
        logits = logits.to(wide_type(logits.dtype))
        return logits if targets is None else -(targets * logits.log_softmax(-1)).sum(-1)


class ClassificationTask:
    """The supervised task (see tasks/base.py for the contract)."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.task = config, _section(config)
        self.labels: tuple[str, ...] = ()
        self._size: Size = config.model.image_shape
        self._rand_augment = RandAugment.of(self.task.aa) if self.task.aa else None
        # timm's: what comes in from outside has the data set's mean colour.
        self._fill = tuple(round(255 * mean) for mean in config.data.pixel_mean)
        num_values = config.model.in_channels * math.prod(self._size)
        keys_and_label, mixing, box = 3 * 8, 6 * 4, 4 * 4
        self.sample_bytes = (
            num_values * np.dtype(config.data.pixel_type).itemsize + keys_and_label + mixing + box * self.task.recount
        )
        self._training_format, self._evaluation_format = training_format(config), evaluation_format(config)

    def build_model(self) -> nn.Module:
        return Classification(self.config)

    def training_sample(self, record: Record, draw: Draw) -> Sample:
        task = self.task
        pixels = training_crop(open_image(record, self._training_format), self._size, task, draw)
        if self._rand_augment:
            how = self._rand_augment
            pixels = rand_augment(pixels, draw, self._fill, how.num_ops, how.magnitude, how.magnitude_std)
        sample = self._sample(record, pixels)
        if task.is_mixed:
            sample["mixing"] = draw_mixing(
                draw.seed,
                draw.position,
                self._size,
                task.mixup,
                task.cutmix,
                task.mixup_switch_prob,
                task.mixup_prob,
            )
        if task.reprob:
            sample["boxes"] = draw_boxes(draw, self._size, task.reprob, task.recount)
            sample["noise_keys"] = np.asarray(draw.tensor_key("noise"), np.int64)
        if self.config.model.drop_path_rate:
            sample["drop_keys"] = np.asarray(draw.tensor_key("drop_path"), np.int64)
        return sample

    def evaluation_sample(self, record: Record, draw: Draw) -> Sample:
        picture = open_image(record, self._evaluation_format)
        return self._sample(record, evaluation_crop(picture, self._size, *self.task.crop))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        arrays = batch.arrays
        extras = (arrays.get(name) for name in ("mixing", "boxes", "noise_keys", "drop_keys"))
        mean: Tensor = model(arrays["images"], arrays["labels"], *extras).mean()
        return mean

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weight, plain cross-entropy, top-1 and top-5 hits, then how often each class was taken for each (row: label,
        column: prediction); with very many classes how many there were of each, and how many were right."""
        labels, weights = batch.arrays["labels"], batch.arrays["weight"].double()
        logits = model(batch.arrays["images"])
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        # Multiples of 2^-24 (as float32 losses from 0.5 on are) add up without rounding to 2^29: the sum over a data
        # set doesn't depend on how it is dealt to ranks.
        losses = torch.round(losses * 2**24) / 2**24
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        totals = torch.stack((torch.ones_like(losses), losses, hits[:, 0].double(), hits.any(1).double()))
        count = self.config.model.num_classes
        if count <= MAX_CONFUSION_CLASSES:
            counts = torch.bincount(labels * count + best[:, 0], weights, count * count)
        else:
            rights = torch.bincount(labels, weights * hits[:, 0], count)
            counts = torch.cat((torch.bincount(labels, weights, count), rights))
        return torch.cat(((totals * weights).sum(1), counts))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        weight, loss, top1, top5 = sums[:_NUM_TOTALS].tolist()
        found = {"loss": loss, "top1": top1, "top5": top5}
        return {name: value / weight if weight else math.nan for name, value in found.items()}

    def confusion(self, sums: Tensor) -> Tensor | None:
        """float64 (K, K): how many samples of each label (row) were taken for each class (column)."""
        count = self.config.model.num_classes
        return sums[_NUM_TOTALS:].reshape(count, count) if count <= MAX_CONFUSION_CLASSES else None

    def per_class(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """float64 (K,) each: samples of every class, and those that were told right."""
        matrix = self.confusion(sums)
        if matrix is not None:
            return matrix.sum(1), matrix.diagonal()
        counts, rights = sums[_NUM_TOTALS:].chunk(2)
        return counts, rights

    def summary(self, sums: Tensor, title: str) -> Image.Image | None:
        """Which classes are taken for which; None with too many of them to show."""
        matrix = self.confusion(sums)
        return None if matrix is None else draw_confusion(matrix.numpy(), self._names, title)

    def panel(self, model: nn.Module, batch: Batch, title: str) -> Image.Image:
        """Images with their label and what the model takes them for."""
        images, labels = batch.arrays["images"], batch.arrays["labels"].tolist()
        shares, best = model(images).softmax(-1).max(-1)
        data = self.config.data
        pictures = shown(images.cpu(), normalised(images.cpu(), data.pixel_mean, data.pixel_std))
        names = self._names
        captions = [
            (names[label], f"{share:.0%} {names[guess]}", label == guess)
            for label, guess, share in zip(labels, best.tolist(), shares.tolist(), strict=True)
        ]
        return draw_gallery(pictures, captions, title)

    @property
    def _names(self) -> tuple[str, ...]:
        count = self.config.model.num_classes
        return self.labels if len(self.labels) == count else tuple(f"class {label}" for label in range(count))

    def _sample(self, record: Record, pixels: NDArray[Any]) -> Sample:
        label = decode_class(record, self.config.model.num_classes)
        return {"images": pixels, "labels": np.asarray(label, np.int64)}


def _section(config: RunConfig) -> ClassificationConfig:
    assert isinstance(config.task, ClassificationConfig)
    return config.task
