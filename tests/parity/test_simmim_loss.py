"""Our SimMIM is Hugging Face's for the same mask, and Microsoft's where its target is normalised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.cases import TOLERANCE, Case, relative_difference
from tests.parity.simmim import UNIT, hf_loss, hf_simmim, images_and_mask, our_simmim, simmim_difference

torch.set_num_threads(1)

CASES = {
    "pretrained windows unset": Case((64, 64), 4, (2, 2, 2), (2, 4, 8), 32),
    "pretrained windows set": Case((64, 64), 8, (2, 2, 2), (2, 4, 8), 32, pretrained=(6, 6, 3)),
}


def local_target(pixels: Tensor, window: int) -> Tensor:
    """Each pixel less the mean and over the deviation (unbiased) of its window's part inside the image, one by one."""
    reach = window // 2
    out = torch.empty_like(pixels)
    for y in range(pixels.shape[2]):
        for x in range(pixels.shape[3]):
            rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
            near = pixels[:, :, rows, columns].flatten(2)
            deviation = (near.var(-1, correction=1) + 1e-6).sqrt()
            out[:, :, y, x] = (pixels[:, :, y, x] - near.mean(-1)) / deviation
    return out


@pytest.mark.parametrize("name", CASES)
def test_prediction_loss_and_all_gradients_are_hugging_faces_for_the_same_mask(name: str) -> None:
    found = simmim_difference(CASES[name])
    assert found["prediction"] <= TOLERANCE
    assert found["loss"] <= TOLERANCE
    assert found["gradient"] <= TOLERANCE


def test_a_target_normalised_by_windows_of_47_is_each_pixel_against_its_own_window() -> None:
    case = CASES["pretrained windows unset"]
    ours = our_simmim(case, target_norm_window=47)
    images, _ = images_and_mask(case)
    pixels = ours.normalised(images).double()
    # Mean square less squared mean of up to 2209 numbers below 4, in float64.
    assert relative_difference(ours.target(pixels), local_target(pixels, 47)) <= TOLERANCE


def test_the_loss_towards_a_normalised_target_is_hugging_faces_reconstruction_against_it() -> None:
    case = CASES["pretrained windows unset"]
    ours = our_simmim(case, target_norm_window=47)
    images, hidden = images_and_mask(case)
    pixels = ours.normalised(images).double()
    with torch.no_grad():
        losses, _ = ours(images, hidden)
        _, reconstruction = hf_loss(case, hf_simmim(case, ours), pixels, hidden)
    hidden_pixels = hidden.repeat_interleave(UNIT, 1).repeat_interleave(UNIT, 2)
    for sample in range(2):
        error = (local_target(pixels, 47) - reconstruction)[sample].abs()
        wanted = error[:, hidden_pixels[sample]].mean()
        # Float32 squares of numbers up to 3.5 less squares of means: 1e-6 of the target where it is largest.
        assert relative_difference(losses[sample].double(), wanted) <= 1e-5
