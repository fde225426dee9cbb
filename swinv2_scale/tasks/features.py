"""Labelled shards as a frozen model sees them: its last level, normalised and averaged over the map."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swinv2_scale import dist
from swinv2_scale.config.run import DataConfig, RemoteConfig
from swinv2_scale.config.tasks import CropRule
from swinv2_scale.data.images.decode import PixelFormat, decode_class, open_image
from swinv2_scale.data.images.transforms import evaluation_crop, normalised
from swinv2_scale.data.loader import PositionDataset, Sample, Share, evaluation_batches
from swinv2_scale.data.order import Order
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.sources.embedded import EMBEDDED_PREFIX, embedded_shards
from swinv2_scale.draws import Draw
from swinv2_scale.errors import DataError
from swinv2_scale.geometry import Size
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.tasks.probing import Features
from swinv2_scale.weights.api import load_into
from swinv2_scale.weights.read import Weights

_BATCH = 64
_MAX_PIXELS: int = DataConfig.model_fields["max_image_pixels"].default
_PREFETCH_BYTES: int = DataConfig.model_fields["prefetch_bytes"].default


@dataclass(frozen=True)
class LabelledImages:
    """A record to its pixels and its class, as an evaluation has them."""

    size: Size
    wanted: PixelFormat
    crop: CropRule

    def __call__(self, record: Record, draw: Draw) -> Sample:
        pixels = evaluation_crop(open_image(record, self.wanted), self.size, *self.crop)
        return {"images": pixels, "labels": np.asarray(decode_class(record, None), np.int64)}


class FrozenModel:
    """Anyone's weights, at their own image size unless another is given, without a head.

    Args:
        crop: what of an image it is shown; None: as the weights say, else ImageNet's usual crop.
        fields: of ModelConfig, where the weights don't say them or others are wanted: image_size, window_size.

    Raises:
        WeightsError: no Swin V2.
    """

    def __init__(self, weights: Weights, crop: CropRule | None = None, **fields: Any) -> None:
        config = weights.config(**fields).model_copy(update={"num_classes": 0})
        self.config, self.crop = config, crop or weights.facts.crop or CropRule()
        self._normalisation = weights.facts.normalisation(config.in_channels)
        self._model = SwinV2(config).eval()
        load_into(self._model, weights)
        self._model.to(dist.device())

    @torch.no_grad()  # not inference_mode: what is fitted to its tensors needs gradients
    def features(self, pattern: str, shards_dir: Path, num_workers: int, show: Callable[[int, int], None]) -> Features:
        """Of all samples of shards, in their order, on the device of this process.

        Args:
            pattern: as ``data.train``, ``embedded:NAME`` included, which is written to ``shards_dir``.
            show: called with samples done and samples in all.

        Raises:
            DataError: no shards, a sample that can't be read or has no label.
        """
        remote = RemoteFiles(RemoteConfig(), num_readers=num_workers + 1)
        is_embedded = pattern.startswith(EMBEDDED_PREFIX)
        shards = read_shard_set(embedded_shards(pattern, shards_dir) if is_embedded else pattern, remote)
        if not shards.num_samples:
            raise DataError(f"{pattern} has no samples", "name shards that have some")
        order = Order.of(shards.sizes, 0, shuffle=False, shuffle_shards=1)
        images = LabelledImages(
            self.config.image_shape, PixelFormat(self.config.in_channels, "uint8", _MAX_PIXELS), self.crop
        )
        dataset = PositionDataset(ShardReader(shards, remote), order, images, False, "probe")
        sample_bytes = self.config.in_channels * math.prod(self.config.image_shape) + 8
        share = Share(_BATCH, _BATCH, 0, 1, num_workers, 2, _PREFETCH_BYTES, sample_bytes)
        values, labels = [], []
        with closing(evaluation_batches(dataset, share, shards.num_samples)) as batches:
            for number, batch in enumerate(batches, 1):
                arrays = batch.to(dist.device()).arrays
                counts = arrays["weight"] > 0  # the last batch is filled up
                pixels = normalised(arrays["images"], *self._normalisation)
                values.append(self._model.forward_features(pixels)[counts])
                labels.append(arrays["labels"][counts])
                show(min(number * _BATCH, shards.num_samples), shards.num_samples)
        return Features(torch.cat(values), torch.cat(labels))
