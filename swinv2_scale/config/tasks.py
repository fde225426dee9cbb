"""One class a task: what it does to images, and what is asked of the model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from swinv2_scale.config.model import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from swinv2_scale.geometry import Size

#: What a section without a name is.
DEFAULT_TASK = "simmim"
Share = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]
CropMode = Literal["center", "squash"]


class CropRule(NamedTuple):
    """What of an image a classifier is shown; the arguments of evaluation_crop() in data/images/transforms.py."""

    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"


def num_hidden(units: Size, ratio: float) -> int:
    """How many of an image's mask units are hidden: the share, rounded up."""
    return math.ceil(ratio * math.prod(units))


class SimMIMConfig(Section):
    """Masked image modelling (SimMIM, arXiv 2111.09886), with the values of the released code."""

    name: Literal["simmim"] = "simmim"
    #: Side of one mask unit in pixels.
    mask_patch_size: PositiveInt = 32
    #: Share of the units that is hidden; the count is rounded up.
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.6
    #: Side of the sliding window whose mean and variance normalise the target; 0: raw pixels. Odd, as Swin V2's 47.
    target_norm_window: NonNegativeInt = 0
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.67, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Share = 0.5
    interpolation: Interpolation = "bilinear"


@dataclass(frozen=True)
class RandAugment:
    """What a name like ``rand-m9-mstd0.5-inc1`` means.

    Attributes:
        num_ops: operations drawn for an image (``n``).
        magnitude: mean level, 0..10 (``m``).
        magnitude_std: its standard deviation (``mstd``).
    """

    num_ops: int
    magnitude: float
    magnitude_std: float

    @classmethod
    def of(cls, name: str) -> RandAugment:
        """
        Raises:
            ValueError: no such name, or one of timm's policies that isn't here.
        """
        parts = name.split("-")
        found = {}
        for part in parts[1:]:
            match = re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part)
            if match is None:
                raise ValueError(f"{part!r} is none of n2, m9, mstd0.5, inc1")
            found[match[1]] = float(match[2])
        if parts[0] != "rand" or found.pop("inc", 0) != 1:
            raise ValueError("RandAugment with inc1 is what there is: rand-m9-mstd0.5-inc1")
        # timm's where the name doesn't say: the highest level, which doesn't vary.
        num_ops, magnitude, magnitude_std = found.get("n", 2.0), found.get("m", 10.0), found.get("mstd", 0.0)
        if magnitude > 10 or not 1 <= num_ops <= 16 or num_ops % 1:
            raise ValueError("m is a level of 0 to 10, n a number of operations, 1 to 16")
        if magnitude_std > 10:
            raise ValueError("mstd is a deviation of levels, at most 10; timm's uniform levels above 100 aren't here")
        return cls(int(num_ops), magnitude, magnitude_std)


class ClassificationConfig(Section):
    """Supervised training with one label an image. Augmentation keys have timm's names, values and meaning."""

    name: Literal["classification"]
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Share = 0.5
    interpolation: Interpolation = "bicubic"
    #: RandAugment, ``rand-m9-mstd0.5-inc1`` in the released recipes (n: operations, m: level, mstd: its deviation);
    #: None: none.
    aa: str | None = None
    #: Random erasing: how often, with what (``const``: 0, ``rand``: a normal colour, ``pixel``: normal noise), and
    #: in at most how many boxes.
    reprob: Share = 0.0
    remode: Literal["const", "rand", "pixel"] = "pixel"
    recount: PositiveInt = 1
    #: Alphas of mixup and cutmix, 0: off; with both, ``mixup_switch_prob`` is how often it is cutmix.
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    mixup_prob: Share = 1.0
    mixup_switch_prob: Share = 0.5
    #: This share of a label is spread over all classes.
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: Evaluation sees the central square, this share of its sides (``center``), or the whole image, its shape changed
    #: (``squash``, as the released models of 384 px are evaluated).
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    crop_mode: CropMode = "center"
    #: The head of ``init_from``: ``auto`` keeps one of the same size and starts a new one otherwise, ``keep`` insists.
    init_head: Literal["auto", "keep", "new"] = "auto"
    #: For a head of other classes: a text file that says for each of ours which of the file's it is (map22kto1k.txt).
    init_head_map: str | None = None
    #: Standard deviation of a new head's weights.
    head_init_std: NonNegativeFloat = 0.02
    #: The file that names the classes, one a line in the order of labels; None: as the shards' manifest names them.
    class_names: str | None = None

    @property
    def crop(self) -> CropRule:
        """Of an evaluation."""
        return CropRule(self.crop_pct, self.crop_mode, self.interpolation)

    @property
    def is_mixed(self) -> bool:
        """Whether images are mixed with their neighbours."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


#: Every task's section by its ``name``.
TASK_SECTIONS: dict[str, type[Section]] = {"simmim": SimMIMConfig, "classification": ClassificationConfig}


def _name_of(task: Any) -> str | None:
    name = task.get("name", DEFAULT_TASK) if isinstance(task, dict) else getattr(task, "name", None)
    return name if isinstance(name, str) else None


TaskConfig = Annotated[
    Annotated[SimMIMConfig, Tag("simmim")] | Annotated[ClassificationConfig, Tag("classification")],
    Discriminator(
        _name_of,
        custom_error_type="no_such_task",
        custom_error_message="no such task",
    ),
]
