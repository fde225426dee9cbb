"""SimMIM with random weights in float64, and Hugging Face's with the same ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Swinv2ForMaskedImageModeling

from swinv2_scale.config.run import RunConfig
from swinv2_scale.tasks.simmim import SimMIM
from tests.parity.cases import Case, random_weights, relative_difference
from tests.parity.peers import HUGGING_FACE, hf_config

#: Side of a mask unit in pixels: one token of the last of three stages.
UNIT = 16
MEAN, STD = (0.3, 0.45, 0.6), (0.2, 0.25, 0.3)


def our_simmim(case: Case, target_norm_window: int = 0) -> SimMIM:
    """In float64, with random weights."""
    config = RunConfig.model_validate(
        {
            "model": {
                "image_size": case.model_image,
                **case.shape,
                "pretrained_window_sizes": case.pretrained,
            },
            "data": {
                "train": "none",
                "global_batch_size": 2,
                "micro_batch_size": 2,
                "pixel_mean": MEAN,
                "pixel_std": STD,
            },
            "task": {"mask_patch_size": UNIT, "target_norm_window": target_norm_window},
            "optim": {"lr": 1e-3, "total_steps": 10},
        }
    )
    model = SimMIM(config).double()
    model.load_state_dict(random_weights(model))
    return model


def hf_simmim(case: Case, ours: SimMIM) -> nn.Module:
    """Hugging Face's, in float64, with our weights; every key must find its place."""
    model = Swinv2ForMaskedImageModeling(hf_config(case)).double().eval()
    model.load_state_dict(HUGGING_FACE.translated(ours.state_dict()), strict=True)
    return model


def images_and_mask(case: Case) -> tuple[Tensor, Tensor]:
    """Two images of smooth and of rough parts as bytes, and which mask units of each are hidden: 6 of 10."""
    generator = torch.Generator().manual_seed(23)
    height, width = case.image
    rough = torch.rand(2, 3, height, width, generator=generator)
    slope = torch.linspace(0, 1, width).expand_as(rough)
    images = (255 * torch.where(torch.arange(height)[:, None] < height // 2, rough, slope)).byte()
    units = (height // UNIT) * (width // UNIT)
    hidden = torch.stack([torch.randperm(units, generator=generator) for _ in range(2)]) < -(-units * 6 // 10)
    return images, hidden.view(2, height // UNIT, width // UNIT)


def hf_loss(case: Case, model: nn.Module, pixels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's loss and reconstruction, asked with tokens instead of units.

    It divides by the number of hidden pixels plus 1e-5 (an integer tensor, so in float32), which is taken back here.
    """
    repeat = UNIT // case.patch
    tokens = hidden.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1)
    out = model(pixels, bool_masked_pos=tokens)
    count = hidden.sum() * UNIT**2
    return out.loss * float(count + 1e-5) / float(count), out.reconstruction


def simmim_difference(case: Case) -> dict[str, float]:
    """Relative difference from Hugging Face's of the prediction, of the loss, and of the gradient that differs most."""
    ours = our_simmim(case)
    peer = hf_simmim(case, ours)
    images, hidden = images_and_mask(case)
    losses, _ = ours(images, hidden)
    with torch.no_grad():
        _, prediction = ours(images, hidden, decode_all=True)
    wanted, reconstruction = hf_loss(case, peer, ours.normalised(images).double(), hidden)
    losses.mean().backward()
    wanted.backward()
    mine = HUGGING_FACE.translated({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() == dict(peer.named_parameters()).keys()
    return {
        "prediction": relative_difference(prediction, reconstruction.detach()),
        "loss": relative_difference(losses.mean().detach(), wanted.detach()),
        "gradient": max(relative_difference(gradient, theirs[name]) for name, gradient in mine.items()),
    }
