"""Our RandAugment and mixing are timm's, number for number, where both are given the same draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_transform
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from swinv2_scale.data.images.augment import OPERATIONS, Warp, rand_augment
from swinv2_scale.data.images.mixing import cut_box, mix, soft_targets
from swinv2_scale.draws import Draw
from tests.support.pictures import smooth

RECIPE = "rand-m9-mstd0.5-inc1"
FILL = {"RGB": (124, 116, 104), "L": 90}
TWO_SIDED = (
    *("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
)
LEVELS = (0.0, 0.4, 2.5, 5.0, 8.7, 9.0, 9.999, 10.0)


def picture(mode: str) -> Image.Image:
    """Smooth parts and rough ones, in a range that leaves contrast to gain."""
    rough = np.random.default_rng(0).integers(20, 220, (48, 40, 3), dtype=np.uint8)
    rough[:16, :24] = np.asarray(smooth())
    return Image.fromarray(rough).convert(mode)


def timm_op(name: str, level: float, is_negative: bool, resample: Image.Resampling, mode: str) -> Image.Image:
    # Its only random number here is the sign's, negative above a half: these seeds start with 0.84 and 0.13.
    random.seed(0 if is_negative else 1)
    op = AugmentOp(name, prob=1.0, magnitude=level, hparams={"img_mean": FILL[mode], "interpolation": resample})
    return op(picture(mode))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_timms_pixel_for_pixel(name: str, mode: str) -> None:
    fill = FILL[mode] if mode == "RGB" else (FILL[mode],)
    sides = set()
    for level in LEVELS:
        if name == "PosterizeIncreasing" and level == 10:
            continue  # see below
        for is_negative in (False, True):
            for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
                theirs = timm_op(name, level, is_negative, resample, mode)
                strength = level / 10 * (-1 if is_negative and name in TWO_SIDED else 1)
                ours = OPERATIONS[name](picture(mode), strength, Warp(resample, fill))
                assert ours.mode == theirs.mode
                assert ours.tobytes() == theirs.tobytes(), (level, is_negative, resample)
                if level == 9:
                    sides.add(ours.tobytes())
    # The comparison is of something: the picture changes, and both sides were reached.
    assert picture(mode).tobytes() not in sides or (name, mode) == ("ColorIncreasing", "L")
    assert len(sides) >= (2 if name in TWO_SIDED and (name, mode) != ("ColorIncreasing", "L") else 1)


def test_timm_cannot_posterize_at_level_ten_and_we_give_what_its_formula_says() -> None:
    # 4 - int(10 / 10 * 4) = 0 bits. When timm no longer raises, level 10 goes back into the comparison above.
    with pytest.raises(ValueError, match="bits must be"):
        timm_op("PosterizeIncreasing", 10.0, False, Image.Resampling.BICUBIC, "RGB")
    found = OPERATIONS["PosterizeIncreasing"](picture("RGB"), 1.0, Warp(Image.Resampling.BICUBIC, FILL["RGB"]))
    assert not np.asarray(found).any()


def test_our_defaults_are_timms_recipe() -> None:
    theirs: RandAugment = rand_augment_transform(RECIPE, {"img_mean": FILL["RGB"]})
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert theirs.choice_weights is None
    # num_ops, magnitude, magnitude_std, interpolation; a random interpolation is one of two.
    ours = rand_augment.__defaults__
    assert ours == (theirs.num_layers, theirs.ops[0].magnitude, theirs.ops[0].magnitude_std, "random")
    assert {op.prob for op in theirs.ops} == {0.5}
    assert theirs.ops[0].kwargs["resample"] == (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def test_as_many_images_are_left_alone_and_they_are_as_far_from_the_original_as_timms() -> None:
    count, original = 1500, np.asarray(picture("RGB"), np.uint8)
    planes = np.ascontiguousarray(original.transpose(2, 0, 1))
    theirs = rand_augment_transform(RECIPE, {"img_mean": FILL["RGB"]})
    random.seed(3)
    np.random.seed(3)
    distances: list[list[float]] = [[], []]
    for sample in range(count):
        ours = rand_augment(planes, Draw(0, 0, str(sample)), FILL["RGB"])
        distances[0].append(np.abs(ours.astype(float) - planes).mean())
        try:
            found = np.asarray(theirs(picture("RGB")))
        except ValueError:  # posterize, see above: black
            found = np.zeros_like(original)
        distances[1].append(np.abs(found.astype(float) - original).mean())
    # Both are fixed by their seeds; two honest samples of one distribution are below this once in a thousand.
    assert ks_2samp(*distances).pvalue > 1e-3


@pytest.mark.parametrize("size", [(192, 192), (33, 20), (1, 7)])
def test_boxes_of_cutmix_are_timms_for_the_same_share_and_centre(size: tuple[int, int]) -> None:
    shares = np.random.default_rng(0).random(200)
    for seed, share in enumerate([0.0, 1.0, *shares]):
        np.random.seed(seed)
        centre = np.random.randint(0, size[0]), np.random.randint(0, size[1])
        np.random.seed(seed)
        theirs, _ = cutmix_bbox_and_lam((3, *size), share)
        assert cut_box(size, share, centre) == tuple(int(edge) for edge in theirs)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_pair_is_mixed_as_timm_mixes_it_in_its_pair_mode(kind: str) -> None:
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1])
    alphas = (0.8, 0.0) if kind == "mixup" else (0.0, 1.0)
    np.random.seed(5)
    theirs, soft = Mixup(*alphas, mode="pair", num_classes=6, label_smoothing=0.1)(images.clone(), labels)
    # Its random numbers, drawn in its order.
    np.random.seed(5)
    share = np.float32(np.random.beta(max(alphas), max(alphas), size=1)[0])
    np.random.rand(1)
    if kind == "mixup":
        row = [share, share, 0, 16, 0, 24]
    else:
        (top, bottom, left, right), own = cutmix_bbox_and_lam((3, 16, 24), share)
        row = [0, own, top, bottom, left, right]
    mixing = torch.tensor([row, row], dtype=torch.float32)
    ours, ours_soft = mix(images, soft_targets(labels, 6, 0.1), mixing)
    # A product rounded in float32 or in float64 before it is added, of numbers below 5.
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert torch.allclose(ours_soft, soft, rtol=0, atol=1e-6)
    assert torch.allclose(ours_soft, mixup_target(labels, 6, float(row[1]), 0.1), rtol=0, atol=1e-6)
