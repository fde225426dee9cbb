"""SimMIM: hide most of an image, predict the hidden pixels with one linear layer.

Shapes: images (B, C_in, H, W); ``hidden`` (B, H/unit, W/unit), True = hidden, everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.tasks import SimMIMConfig, num_hidden
from swinv2_scale.data.images.decode import evaluation_format, open_image, training_format
from swinv2_scale.data.images.transforms import central_resized_crop, normalised, training_crop
from swinv2_scale.data.loader import Batch, Sample
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.draws import Draw
from swinv2_scale.geometry import Size
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.models.precision import wide_type

#: Grey that stands for hidden pixels in panels.
_HIDDEN_GREY = 128


def mask_units(config: RunConfig) -> Size:
    """Mask units of an image along each axis."""
    return tuple(length // _section(config).mask_patch_size for length in config.model.image_shape)


def draw_hidden(units: Size, ratio: float, draw: Draw) -> NDArray[np.bool_]:
    """Which mask units are hidden: ``num_hidden`` of them, drawn without replacement.

    Returns:
        bool array of shape ``units``, True = hidden.
    """
    total = math.prod(units)
    # The smallest of as many uniform numbers: numpy promises `random`'s stream, not `permutation`'s.
    chosen = np.argsort(draw.generator("mask").random(total), kind="stable")[: num_hidden(units, ratio)]
    hidden = np.zeros(total, np.bool_)
    hidden[chosen] = True
    return hidden.reshape(units)


class SimMIM(nn.Module):
    """Encoder, mask token and the linear pixel head, named as in the released code.

    Args:
        config: its sections model, task and data are read.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, task = config.model, _section(config)
        self.mask_patch_size = task.mask_patch_size
        self.num_hidden = num_hidden(mask_units(config), task.mask_ratio)
        self.target_norm_window = task.target_norm_window
        self.pixel_mean, self.pixel_std = config.data.pixel_mean, config.data.pixel_std
        self.encoder = SwinV2(model)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.embed_dim))
        # A Sequential so that its weights have the released names.
        self.decoder = nn.Sequential(nn.Conv2d(model.stage_dims[-1], model.stride**2 * model.in_channels, 1))

    def forward(
        self, images: Tensor, hidden: Tensor, drop_keys: Tensor | None = None, decode_all: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            images: (B, C_in, H, W) of the configured pixel type.
            hidden: bool (B, H/unit, W/unit), the configured share of each sample (``num_hidden``).
            drop_keys: int64 (B,) for drop path; None drops nothing.
            decode_all: decode the visible units too, for the prediction; the loss doesn't need them.

        Returns:
            (B,) float32, each sample's mean absolute error over its hidden pixels and channels; and the prediction,
            float32 (B, C_in, H, W), in normalised pixels, or None where only hidden units were decoded.
        Source: SimMIM (arXiv 2111.09886) sec. 3; every sample hides the same number of pixels, so the mean over
        samples is the released loss. Sums are in float32: in half precision they overflow with a few images.
        """
        pixels = self.normalised(images)
        encoder = self.encoder
        tokens, map_size = encoder.patch_embed(pixels.to(encoder.patch_embed.proj.weight.dtype))
        repeat = self.mask_patch_size // encoder.config.patch_size
        hidden_tokens = _repeated(hidden, repeat).flatten(1)[..., None]
        tokens = torch.where(hidden_tokens, self.mask_token.to(tokens.dtype), tokens)
        features, map_size = encoder.forward_levels(tokens, map_size, drop_keys)[-1]
        target = self.target(pixels)
        if decode_all or self.mask_patch_size % encoder.config.stride:
            return self._loss_of_all(features, map_size, target, hidden)
        return self._loss_of_hidden(features, map_size, target, hidden), None

    def _loss_of_all(self, features: Tensor, map_size: Size, target: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Decode every token of the last stage, and count the pixels that are hidden."""
        features = self.encoder.norm(features).transpose(1, 2)
        decoded = self.decoder[0](features.view(*features.shape[:2], *map_size))
        prediction = F.pixel_shuffle(decoded.to(wide_type(decoded.dtype)), self.encoder.config.stride)
        error = (target - prediction).abs()
        hidden_pixels = _repeated(hidden, self.mask_patch_size)[:, None].float()
        count = hidden_pixels.sum((1, 2, 3)) * target.shape[1]
        return (error * hidden_pixels).sum((1, 2, 3)) / count, prediction

    def _loss_of_hidden(self, features: Tensor, map_size: Size, target: Tensor, hidden: Tensor) -> Tensor:
        """The same number where each token of the last stage lies in one mask unit: visible ones are left out.

        Which units are hidden is the sample's own, how many is the configuration's: no shape depends on data.
        """
        stride, unit = self.encoder.config.stride, self.mask_patch_size
        units = hidden.flatten(1).byte().argsort(stable=True, dim=1, descending=True)[:, : self.num_hidden]
        side = unit // stride
        tokens = features.view(len(units), *map_size, -1)
        features = self.encoder.norm(_taken(tokens, side, units).flatten(1, 3))
        # Through the convolution's own module, whose weight ZeRO-3 brings when it is called.
        decoded = self.decoder[0](features.transpose(1, 2)[..., None])
        prediction = decoded.to(wide_type(decoded.dtype)).view(
            len(units), -1, stride, stride, *units.shape[1:], side, side
        )
        prediction = prediction.permute(0, 4, 5, 2, 6, 3, 1).reshape(*units.shape, unit, unit, -1)
        error: Tensor = _taken(target.movedim(1, -1), unit, units) - prediction
        return error.abs().mean((1, 2, 3, 4))

    def normalised(self, images: Tensor) -> Tensor:
        """Pixels of any type to float32 of about zero mean and unit variance."""
        return normalised(images, self.pixel_mean, self.pixel_std)

    def target(self, pixels: Tensor) -> Tensor:
        """What is to be predicted: the pixels, or the pixels normalised by a sliding window around each.

        Source: Swin V2's released SimMIM recipes normalise with a window of 47; the mean and the unbiased variance are
        over the part of the window that lies inside the image.
        """
        window = self.target_norm_window
        if not window:
            return pixels

        def local_mean(x: Tensor) -> Tensor:
            return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False)

        ones = torch.ones_like(pixels[:1, :1])
        count = F.avg_pool2d(ones, window, stride=1, padding=window // 2) * window**2
        mean = local_mean(pixels)
        variance = (local_mean(pixels.square()) - mean.square()).clamp_min(0) * count / (count - 1)
        return (pixels - mean) / (variance + 1e-6).sqrt()


class SimMIMTask:
    """The pre-training task (see tasks/base.py for the contract)."""

    labels: tuple[str, ...] = ()

    def __init__(self, config: RunConfig) -> None:
        self.config, self.task = config, _section(config)
        self.units = mask_units(config)
        num_values = config.model.in_channels * math.prod(config.model.image_shape)
        drop_key_bytes = 8
        self.sample_bytes = (
            num_values * np.dtype(config.data.pixel_type).itemsize + math.prod(self.units) + drop_key_bytes
        )
        self._training_format, self._evaluation_format = training_format(config), evaluation_format(config)

    def build_model(self) -> nn.Module:
        return SimMIM(self.config)

    def training_sample(self, record: Record, draw: Draw) -> Sample:
        picture = open_image(record, self._training_format)
        return self._sample(training_crop(picture, self.config.model.image_shape, self.task, draw), draw)

    def evaluation_sample(self, record: Record, draw: Draw) -> Sample:
        picture = open_image(record, self._evaluation_format)
        pixels = central_resized_crop(picture, self.config.model.image_shape, self.task.interpolation)
        return self._sample(pixels, draw)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        keys = batch.arrays["drop_keys"] if self.config.model.drop_path_rate else None
        losses, _ = model(batch.arrays["images"], batch.arrays["hidden"], keys)
        mean: Tensor = losses.mean()
        return mean

    def evaluation_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weighted sum of the samples' losses, sum of their weights."""
        losses, _ = model(batch.arrays["images"], batch.arrays["hidden"])
        weights = batch.arrays["weight"].double()
        return torch.stack(((losses.double() * weights).sum(), weights.sum()))

    def metrics(self, sums: Tensor) -> dict[str, float]:
        total, weight = sums.tolist()
        # Without a whole sample there is no loss; more are lost then than any run allows.
        return {"loss": total / weight if weight else math.nan}

    def summary(self, sums: Tensor, title: str) -> None:
        """The panel shows all there is to see."""

    def panel(self, model: nn.Module, batch: Batch, title: str) -> Image.Image:
        """Rows of original | masked | reconstruction; the reconstruction shows visible pixels as they are.

        A normalised target has no brightness of its own, and borrowing the target's would leak it: such predictions
        are shown around mid-grey. So is everything in float32, whose range nobody knows.
        """
        data = self.config.data
        images, hidden = batch.arrays["images"], batch.arrays["hidden"]
        _, prediction = model(images, hidden, decode_all=True)
        prediction, pixels = prediction.cpu(), normalised(images.cpu(), data.pixel_mean, data.pixel_std)
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.pixel_mean, data.pixel_std))
        around_grey = images.dtype == torch.float32
        original = _shown(0.5 + pixels / 6 if around_grey else pixels * std + mean)
        around_grey = around_grey or bool(self.task.target_norm_window)
        predicted = _shown(0.5 + prediction / 6 if around_grey else prediction * std + mean)
        mask = _repeated(hidden.cpu(), self.task.mask_patch_size)[:, None]
        masked = torch.where(mask, torch.full_like(original, _HIDDEN_GREY), original)
        title += f": {self.task.mask_ratio:.0%} hidden in units of {self.task.mask_patch_size} px"
        return draw_panel([original, masked, torch.where(mask, predicted, original)], title)

    def _sample(self, pixels: NDArray[Any], draw: Draw) -> Sample:
        return {
            "images": pixels,
            "hidden": draw_hidden(self.units, self.task.mask_ratio, draw),
            "drop_keys": np.asarray(draw.tensor_key("drop_path"), np.int64),
        }


def _section(config: RunConfig) -> SimMIMConfig:
    assert isinstance(config.task, SimMIMConfig)
    return config.task


def draw_panel(columns: list[Tensor], title: str) -> Image.Image:
    """Rows of images side by side under their names, in two blocks when there are more than four.

    Args:
        columns: original, masked, reconstruction: uint8 (B, 1 or 3, H, W) each.
    """
    names = ("original", "masked", "reconstruction")
    count, channels, height, width = columns[0].shape
    if channels not in (1, 3):
        columns, channels = [column[:, :1] for column in columns], 1
    zoom = max(1, 112 // max(height, width))
    cell_h, cell_w, gap, head = height * zoom, width * zoom, 4, 34
    blocks = 2 if count > 4 else 1
    rows = -(-count // blocks)
    block_w = 3 * (cell_w + gap) + 2 * gap
    picture = Image.new("RGB", (blocks * block_w, head + rows * (cell_h + gap)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((gap, 3), title, fill="black")
    for number in range(count):
        block, row = divmod(number, rows)
        for place, column in enumerate(columns):
            x, y = block * block_w + gap + place * (cell_w + gap), head + row * (cell_h + gap)
            pixels = column[number].expand(3, height, width).permute(1, 2, 0).contiguous().numpy()
            picture.paste(Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
            pen.text((x, 18), names[place], fill="black")
    return picture


def _shown(brightness: Tensor) -> Tensor:
    """0..1 to uint8, clipped."""
    return (brightness.clamp(0, 1) * 255).round().to(torch.uint8)


def _repeated(hidden: Tensor, times: int) -> Tensor:
    """Each mask unit as ``times`` x ``times`` tokens or pixels."""
    return hidden.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _taken(x: Tensor, side: int, units: Tensor) -> Tensor:
    """Some squares of a map: (B, h, w, C) -> (B, n, side, side, C), those numbered (B, n), row by row.

    No number comes twice in a row, so that the gradient's additions have one order.
    """
    batch, height, width, channels = x.shape
    squares = x.view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
    squares = squares.reshape(batch, -1, side * side * channels)
    taken = squares.gather(1, units[..., None].expand(-1, -1, squares.shape[2]))
    return taken.view(*units.shape, side, side, channels)
