"""Images of more than eight bits through SimMIM: normalised over their own range, and shown."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.loader import Batch
from swinv2_scale.data.shards.reader import Record
from swinv2_scale.draws import Draw
from swinv2_scale.tasks.simmim import SimMIM, SimMIMTask


def config(pixel_type: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "image_size": 32,
                "in_channels": 1,
                "embed_dim": 32,
                "depths": (1,),
                "num_heads": (2,),
                "window_size": 4,
            },
            "data": {
                "train": "none",
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "pixel_type": pixel_type,
                "pixel_mean": (0.4,),
                "pixel_std": (0.2,),
            },
            "task": {"mask_patch_size": 8, "crop_scale": (1, 1), "crop_ratio": (1, 1), "flip_probability": 0},
            "optim": {"lr": 1e-3, "total_steps": 10},
        }
    )


def sample_of(pixel_type: str, values: np.ndarray) -> dict[str, np.ndarray]:
    buffer = io.BytesIO()
    np.save(buffer, values)
    record = Record("a", "t.tar/a", {"npy": buffer.getvalue()})
    return SimMIMTask(config(pixel_type)).training_sample(record, Draw(0, 0, "a"))


@pytest.mark.parametrize(("pixel_type", "largest"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_pixels_are_normalised_over_the_range_of_their_type(pixel_type: str, largest: int) -> None:
    values = (np.linspace(0, 1, 32 * 32).reshape(32, 32) * largest).astype(pixel_type)
    images = torch.from_numpy(sample_of(pixel_type, values)["images"])[None]
    assert images.numpy().dtype == pixel_type
    found = SimMIM(config(pixel_type)).normalised(images)
    assert found.dtype == torch.float32
    wanted = (values / largest - 0.4) / 0.2
    # Two float32 operations on numbers up to 3.
    assert np.allclose(found[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("pixel_type", ["uint8", "uint16", "float32"])
def test_the_memory_that_is_planned_is_the_samples(pixel_type: str) -> None:
    sample = sample_of(pixel_type, np.zeros((32, 32), pixel_type))
    assert sum(array.nbytes for array in sample.values()) == SimMIMTask(config(pixel_type)).sample_bytes


@pytest.mark.parametrize("pixel_type", ["uint16", "float32"])
def test_a_panel_shows_wide_pixels(pixel_type: str) -> None:
    run = config(pixel_type)
    largest = 65535 if pixel_type == "uint16" else 1
    images = (torch.linspace(0, 1, 32 * 32).reshape(1, 1, 32, 32) * largest).numpy().astype(pixel_type)

    class Zero(torch.nn.Module):
        def forward(self, images: Tensor, hidden: Tensor, *, decode_all: bool) -> tuple[Tensor, Tensor]:
            return torch.zeros(1), torch.zeros(images.shape)

    batch = Batch({"images": torch.from_numpy(images), "hidden": torch.zeros(1, 4, 4, dtype=torch.bool)}, 0)
    panel = np.asarray(SimMIMTask(run).panel(Zero(), batch, ""))[34 : 34 + 96, 4 : 4 + 96, 0]
    brightness = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    if pixel_type == "float32":  # around mid-grey, three standard deviations to either side
        brightness = 0.5 + (brightness - 0.4) / 0.2 / 6
    wanted = brightness * 255
    assert abs(panel[1::3, 1::3].astype(float) - wanted.clip(0, 255)).max() <= 1
