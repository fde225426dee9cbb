"""The images and the order of labels of an evaluation, compared with torchvision's and timm's."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from swinv2_scale.config.tasks import CropMode
from swinv2_scale.data.images.resize import channels_first
from swinv2_scale.data.images.transforms import evaluation_crop
from swinv2_scale.data.sources.imagenet import imagenet_1k_wnids
from tests.support.pictures import encoded, noise, npy, opened

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def released(size: int, crop_mode: str, interpolation: str) -> Compose:
    """As data/build.py has it: TEST.CROP, or not."""
    how = MODES[interpolation]
    if crop_mode == "squash":
        return Compose([Resize((size, size), how)])
    return Compose([Resize(int(256 / 224 * size), how), CenterCrop(size)])


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    crop_mode=st.sampled_from(["center", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_every_image_is_cropped_and_resized_as_torchvision_does_it(
    width: int, height: int, size: int, crop_mode: CropMode, interpolation: str
) -> None:
    image = noise(width * height, width, height)
    found = evaluation_crop(opened("png", encoded(image, "PNG")), (size, size), 0.875, crop_mode, interpolation)
    wanted = released(size, crop_mode, interpolation)(image)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, channels_first(np.asarray(wanted)))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (333, 1000), (257, 256), (219, 219)])
@pytest.mark.parametrize("size", [192, 256])
def test_photographs_of_usual_sizes_are_the_same_bits_too(width: int, height: int, size: int) -> None:
    image = noise(1, width, height)
    found = evaluation_crop(opened("png", encoded(image, "PNG")), (size, size), 0.875, "center", "bicubic")
    wanted = channels_first(np.asarray(released(size, "center", "bicubic")(image)))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 1.0])
def test_timms_other_shares_are_the_same_rule(crop_pct: float) -> None:
    image = noise(2, 47, 33)
    found = evaluation_crop(opened("png", encoded(image, "PNG")), (24, 24), crop_pct, "center", "bicubic")
    wanted = Compose([Resize(int(24 / crop_pct), MODES["bicubic"]), CenterCrop(24)])(image)
    np.testing.assert_array_equal(found, channels_first(np.asarray(wanted)))


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_pixel_types_have_the_same_boxes(dtype: type, crop_mode: CropMode) -> None:
    values = np.random.default_rng(0).random((31, 45), np.float32)
    array = (values * 65535).astype(np.uint16) if dtype is np.uint16 else values
    picture = opened("npy", npy(array), 1, pixel_type=np.dtype(dtype).name)
    found = evaluation_crop(picture, (20, 20), 0.875, crop_mode, "bicubic")
    wanted = np.asarray(released(20, crop_mode, "bicubic")(Image.fromarray(array.astype(np.float32))))
    if dtype is np.uint16:
        wanted = np.rint(wanted).clip(0, 65535).astype(np.uint16)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0], wanted)


def test_imagenets_classes_are_timms_in_the_same_order() -> None:
    assert (files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split() == imagenet_1k_wnids()
