"""RandAugment as timm's ``rand-m9-mstd0.5-inc1``, on Pillow, every number from the sample's own draw.

A level is 0..10. Operations take a strength of level / 10, negative on one side where they have two sides.
Source: RandAugment (arXiv 1909.13719); operations, ranges and names of timm 1.0.31, ``inc1``: stronger with the level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from swinv2_scale.data.images.resize import INTERPOLATION, channels_first
from swinv2_scale.draws import Draw

_APPLY_PROBABILITY = 0.5
_MAX_LEVEL = 10.0


@dataclass(frozen=True)
class Warp:
    """How an image is moved.

    Args:
        resample: Pillow's filter.
        fill: what comes in from outside, a value per channel.
    """

    resample: Image.Resampling
    fill: tuple[int, ...]

    def affine(self, image: Image.Image, *matrix: float) -> Image.Image:
        """Pixel (x, y) shows what was at (a x + b y + c, d x + e y + f)."""
        kind = Image.Transform.AFFINE
        return image.transform(image.size, kind, matrix, resample=self.resample, fillcolor=self._fill_of(image))

    def rotated(self, image: Image.Image, degrees: float) -> Image.Image:
        """Counter-clockwise around the middle."""
        return image.rotate(degrees, resample=self.resample, fillcolor=self._fill_of(image))

    def _fill_of(self, image: Image.Image) -> int | tuple[int, ...]:
        return self.fill[0] if image.mode == "L" else self.fill


Operation = Callable[[Image.Image, float, Warp], Image.Image]


def _posterized(image: Image.Image, strength: float, _: Warp) -> Image.Image:
    """Keeps the highest 4 bits at strength 0 down to none at 1, which is black.

    Not ImageOps.posterize: it refuses 0 bits since Pillow 13, where timm's own recipe ends with a ValueError.
    """
    mask = 0xFF & ~(0xFF >> (4 - int(strength * 4)))
    return _looked_up(image, [value & mask for value in range(256)])


def _solarized_by_adding(image: Image.Image, strength: float, _: Warp) -> Image.Image:
    """Brightens what is darker than 128."""
    added = int(strength * 110)
    return _looked_up(image, [min(255, value + added) if value < 128 else value for value in range(256)])


def _looked_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _factor(strength: float) -> float:
    """Of an enhancement: 1 changes nothing."""
    return max(0.1, 1.0 + strength * 0.9)


#: In timm's order, under timm's names.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, strength, warp: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength, warp: ImageOps.equalize(image),
    "Invert": lambda image, strength, warp: ImageOps.invert(image),
    "Rotate": lambda image, strength, warp: warp.rotated(image, strength * 30.0),
    "PosterizeIncreasing": _posterized,
    "SolarizeIncreasing": lambda image, strength, warp: ImageOps.solarize(image, 256 - int(strength * 256)),
    "SolarizeAdd": _solarized_by_adding,
    "ColorIncreasing": lambda image, strength, warp: ImageEnhance.Color(image).enhance(_factor(strength)),
    "ContrastIncreasing": lambda image, strength, warp: ImageEnhance.Contrast(image).enhance(_factor(strength)),
    "BrightnessIncreasing": lambda image, strength, warp: ImageEnhance.Brightness(image).enhance(_factor(strength)),
    "SharpnessIncreasing": lambda image, strength, warp: ImageEnhance.Sharpness(image).enhance(_factor(strength)),
    "ShearX": lambda image, strength, warp: warp.affine(image, 1, strength * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, strength, warp: warp.affine(image, 1, 0, 0, strength * 0.3, 1, 0),
    "TranslateXRel": lambda image, strength, warp: warp.affine(image, 1, 0, strength * 0.45 * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, strength, warp: warp.affine(image, 1, 0, 0, 0, 1, strength * 0.45 * image.height),
}
#: Stronger in one direction only; all others go either way.
_ONE_SIDED = frozenset(
    {"AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"}
)


class Step(NamedTuple):
    """One operation to apply."""

    operation: str
    strength: float
    resample: Image.Resampling


def draw_steps(
    rng: np.random.Generator, num_ops: int, magnitude: float, magnitude_std: float, interpolation: str
) -> list[Step]:
    """``num_ops`` operations, drawn with repetition, less those that a coin leaves out.

    Five uniform numbers an operation whether it is applied or not: numpy promises `random`'s stream, not `normal`'s.
    """
    names, steps = tuple(OPERATIONS), []
    for which, applied, quantile, side, filtered in rng.random((num_ops, 5)).tolist():
        if applied >= _APPLY_PROBABILITY:
            continue
        name = names[int(which * len(names))]
        # 0 is the only number of [0, 1) that has no quantile.
        level = magnitude + magnitude_std * NormalDist().inv_cdf(quantile or 2.0**-53)
        strength = max(0.0, min(level, _MAX_LEVEL)) / _MAX_LEVEL
        if side < 0.5 and name not in _ONE_SIDED:
            strength = -strength
        filter_name = ("bilinear" if filtered < 0.5 else "bicubic") if interpolation == "random" else interpolation
        steps.append(Step(name, strength, INTERPOLATION[filter_name]))
    return steps


def rand_augment(
    pixels: NDArray[np.uint8],
    draw: Draw,
    fill: tuple[int, ...],
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    interpolation: str = "random",
) -> NDArray[np.uint8]:
    """The image after RandAugment, a function of the pixels and the sample's draw alone.

    Args:
        pixels: uint8 (C, H, W), C = 1 or 3; is not changed.
        fill: what comes in from outside the image, a value per channel; timm takes round(255 * pixel_mean).
        num_ops: operations drawn; each is applied with a probability of a half.
        magnitude: mean level, 0..10.
        magnitude_std: of the normal distribution of levels; those outside 0..10 become 0 or 10.
        interpolation: ``bilinear`` or ``bicubic`` (the released Swin recipes), or ``random``: either, timm's default.

    Returns:
        uint8 (C, H, W), contiguous; ``pixels`` itself where nothing is applied.
    """
    assert pixels.dtype == np.uint8, pixels.dtype
    assert len(pixels) == len(fill), f"{len(pixels)} channels, fill {fill}"
    assert len(fill) in (1, 3), f"{len(fill)} channels"
    steps = draw_steps(draw.generator("rand_augment"), num_ops, magnitude, magnitude_std, interpolation)
    if not steps:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
    for name, strength, resample in steps:
        image = OPERATIONS[name](image, strength, Warp(resample, fill))
    return channels_first(np.asarray(image))
