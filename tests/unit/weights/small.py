"""The small models that files of weights are made of here, and files as other people's programs write them."""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinv2_scale.config.run import RunConfig
from swinv2_scale.models.backbone import SwinV2
from swinv2_scale.models.factory import create_model
from swinv2_scale.tasks.simmim import SimMIM
from swinv2_scale.weights.api import load_weights

#: Two stages, 32 px, maps of 8 and 4 tokens: every window used is 4, so every format can hold it.
FIELDS: dict[str, Any] = {
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "image_size": 32,
    "window_size": 4,
    "num_classes": 5,
}
#: Four stages; at 192 px with windows of 12 the last map is 6x6, so the windows really used are [12, 12, 12, 6].
FOUR_STAGES: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "num_classes": 3}
FORMATS = ("native", "hf", "timm", "microsoft", "torchvision")


def named(stem: str, style: str) -> str:
    """A file's name, or a folder's for Hugging Face."""
    return stem if style == "hf" else f"{stem}.pth"


def classifier(**fields: Any) -> SwinV2:
    """A backbone with a class head, every one of its numbers another one."""
    return copy.deepcopy(_classifier(tuple(sorted({**FIELDS, **fields}.items()))))


@lru_cache(maxsize=64)
def _classifier(fields: tuple[tuple[str, Any], ...]) -> SwinV2:
    with torch.device("meta"):
        model = create_model("swinv2_tiny", **dict(fields))
    model.to_empty(device="cpu")
    randomise(model)
    return model.eval()


def other_values(model: nn.Module) -> nn.Module:
    """The same model with other values, to see that loading replaces every one."""
    randomise(model, seed=1)
    return model


def simmim(num_classes: int = 0, **fields: Any) -> SimMIM:
    """A pre-training model: its backbone's names begin with ``encoder.``."""
    model = {**FIELDS, "num_classes": num_classes, **fields}
    channels = model.get("in_channels", 3)
    data = {
        "train": "none",
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "pixel_mean": (0.5,) * channels,
        "pixel_std": (0.5,) * channels,
    }
    task, optim = {"mask_patch_size": 8}, {"lr": 1e-3, "total_steps": 1}
    built = SimMIM(RunConfig.model_validate({"model": model, "data": data, "task": task, "optim": optim}))
    randomise(built)
    return built.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, under the names that Microsoft's code and ours have in common."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = state(model), state(expected)
    assert found.keys() == wanted.keys()
    differing = [name for name, value in found.items() if not torch.equal(value, wanted[name])]
    assert not differing


def assert_holds_the_classifier(path: Path) -> None:
    """Loading a file replaces every value of a classifier by classifier()'s own."""
    loaded = other_values(classifier())
    load_weights(loaded, path)
    assert_same_bits(loaded, classifier())


def pictures(channels: int = 3, size: int | tuple[int, int] = 32) -> Tensor:
    shape = (size, size) if isinstance(size, int) else size
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(9))


# --- what Microsoft's program keeps beside the weights ----------------------------------------------------------------


def microsoft_buffers(
    image_size: int,
    window_size: int,
    pretrained: tuple[int, ...],
    depths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """relative_coords_table, relative_position_index and attn_mask of every block, by the released formulas.

    A map no larger than the window has a window of its own size, and no shift; a shifted block has a mask a window.
    Of index and mask only the shapes are true: at 640 px they would be 200 MB.
    """
    buffers = {}
    for stage, depth in enumerate(depths):
        length = image_size // 4 // 2**stage
        window = min(window_size, length)
        divisor = pretrained[stage] - 1 if pretrained[stage] else window - 1
        axis = torch.arange(-(window - 1), window, dtype=torch.float32) / divisor * 8
        axis = torch.sign(axis) * torch.log2(axis.abs() + 1.0) / math.log2(8)
        table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)[None]
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}."
            area = window**2
            buffers[prefix + "attn.relative_coords_table"] = table.to(dtype)
            buffers[prefix + "attn.relative_position_index"] = torch.zeros(1, dtype=torch.int64).expand(area, area)
            if block % 2 and length > window:
                buffers[prefix + "attn_mask"] = torch.zeros(1, dtype=dtype).expand((length // window) ** 2, area, area)
    return buffers


def yacs_config(
    monkeypatch: pytest.MonkeyPatch, image_size: int, window_size: int, pretrained: tuple[int, ...]
) -> dict[str, Any]:
    """What Microsoft's trainer saves as ``config``, pickled as the class that it is there.

    The stand-in leaves the same opcodes in the file as yacs 0.1.8's own CfgNode does (compared with pickletools).
    """

    def node(**values: Any) -> dict[str, Any]:
        made = cfg_node(values)
        made.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)
        return made

    cfg_node = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module = ModuleType("yacs.config")
    module.CfgNode = cfg_node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    swin = node(WINDOW_SIZE=window_size, PRETRAINED_WINDOW_SIZES=list(pretrained))
    return node(DATA=node(IMG_SIZE=image_size), MODEL=node(TYPE="swinv2", SWINV2=swin))


def save_pickle(data: Any, path: Path, **options: Any) -> Path:
    torch.save(data, path, **options)
    return path


def save_state(model: nn.Module, path: Path, prefix: str = "") -> Path:
    """A bare state dict, as ``torch.save(model.state_dict(), path)`` leaves it."""
    return save_pickle(OrderedDict((prefix + name, value) for name, value in state(model).items()), path)
