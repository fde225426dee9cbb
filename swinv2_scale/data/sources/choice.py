"""The layouts by the names that the command line has for them."""

from __future__ import annotations

from pathlib import Path

from swinv2_scale.data.sources.ade20k import list_ade20k
from swinv2_scale.data.sources.coco import list_coco
from swinv2_scale.data.sources.folders import list_image_folder
from swinv2_scale.data.sources.imagenet import list_imagenet, list_imagenet_v2
from swinv2_scale.data.sources.kinetics import list_kinetics
from swinv2_scale.data.sources.listing import Source
from swinv2_scale.data.sources.table import list_table
from swinv2_scale.errors import ConfigError, DataError

_WHOLE = {"imagefolder": list_image_folder, "csv": list_table, "imagenet-v2": list_imagenet_v2}
_SPLIT = {"imagenet": list_imagenet, "coco": list_coco, "ade20k": list_ade20k, "kinetics": list_kinetics}


def split_of(layout: str, asked: str | None) -> str | None:
    """The split that is meant: ``train`` unless another is asked; None for layouts without splits.

    Raises:
        ConfigError: one is asked of those.
    """
    if layout in _SPLIT:
        return asked or "train"
    if asked is not None:
        raise ConfigError(f"--from {layout} has no splits", f"leave --split out and give the {asked} part as SRC")
    return None


def list_source(layout: str, path: Path, split: str | None) -> Source:
    """What is at ``path``.

    Args:
        split: of ``split_of``.

    Raises:
        DataError: nothing there, or not in this layout.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return _WHOLE[layout](path) if split is None else _SPLIT[layout](path, split)
