"""Where a peer does something else, or nothing: the cases, and what the peer does there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.parity.cases import LARGEST_LOGIT_SCALE, Case, random_images, weights_of
from tests.parity.peers import HUGGING_FACE, TIMM, TIMM_ANY_SIZE, TORCHVISION, Peer

FOUR = {"depths": (2, 2, 2, 2), "heads": (2, 4, 8, 16), "embed_dim": 32}
TWO = {"depths": (2, 2), "heads": (2, 4), "embed_dim": 32}

CASES = {
    "64x128, window 8": Case((64, 128), 8, **FOUR),
    "128x64, window 4": Case((128, 64), 4, **FOUR),
    "96x64, window 8": Case((96, 64), 8, **FOUR),
    "16x80, window 6 (longer than the height)": Case((16, 80), 6, **TWO),
    "80x80, window 6 (map 20)": Case((80, 80), 6, **TWO),
    "192, window 4 (1536, window 32)": Case((192, 192), 4, **{**FOUR, "depths": (1, 1, 2, 2)}, pretrained=(3, 3, 3, 2)),
    "100, window 5, odd maps at merging": Case((100, 100), 5, **FOUR),
    "50, window 4, patches beyond the image": Case((50, 50), 4, **TWO),
    "64, window 4, last map 2": Case((64, 64), 4, **FOUR),
    "32, window 4, last map 1, pretrained window 1": Case((32, 32), 4, **FOUR, pretrained=(4, 4, 2, 1)),
    "16, window 4, two maps of 1": Case((16, 16), 4, **FOUR),
    "32, window 4, pretrained windows 3": Case((32, 32), 4, **TWO, pretrained=(3, 3)),
    "16, window 1": Case((16, 16), 1, **TWO),
    "64x96, window (4, 6)": Case((64, 96), (4, 6), **TWO),
    "made for 64, run at 128": Case((128, 128), 8, (2, 2, 2), (2, 4, 8), 32, built_for=(64, 64)),
    "made for 128, run at 64": Case((64, 64), 8, (2, 2, 2), (2, 4, 8), 32, built_for=(128, 128)),
}


@dataclass(frozen=True)
class Disagreement:
    """What a peer's logits are in a case."""

    case: str
    peer: Peer
    #: Relative to the definition's logits, at least this far away; None where there are no numbers to compare.
    at_least: float | None
    #: "differs", "is not a number", or the name of the error.
    outcome: str = "differs"
    why: str = ""


WINDOW_OF_HEIGHT = "one window for both axes, clipped by the height alone"
PADDING_SEEN = "padding tokens are keys, with a score of their bias"
ROLL_FIRST = "rolls, then pads; padding tokens are keys"
FROZEN = "windows stay as clipped for the size it was made for; smaller maps are padded, and the padding seen"

DISAGREEMENTS = (
    Disagreement("64x128, window 8", HUGGING_FACE, 0.01, why=WINDOW_OF_HEIGHT),
    Disagreement("128x64, window 4", HUGGING_FACE, 0.01, why=WINDOW_OF_HEIGHT + ", the narrower map padded"),
    Disagreement("96x64, window 8", TIMM, 0.01, why=ROLL_FIRST),
    Disagreement("96x64, window 8", HUGGING_FACE, 0.01, why=WINDOW_OF_HEIGHT + "; " + PADDING_SEEN),
    Disagreement("16x80, window 6 (longer than the height)", TIMM, 0.01, why=ROLL_FIRST),
    Disagreement("16x80, window 6 (longer than the height)", HUGGING_FACE, 0.01, why=WINDOW_OF_HEIGHT),
    Disagreement("80x80, window 6 (map 20)", TIMM, 0.01, why=ROLL_FIRST),
    Disagreement("80x80, window 6 (map 20)", HUGGING_FACE, 0.01, why=PADDING_SEEN),
    Disagreement("80x80, window 6 (map 20)", TORCHVISION, 0.01, why=PADDING_SEEN),
    Disagreement("192, window 4 (1536, window 32)", TIMM, 0.01, why=ROLL_FIRST),
    Disagreement("192, window 4 (1536, window 32)", HUGGING_FACE, 0.01, why=PADDING_SEEN),
    Disagreement("100, window 5, odd maps at merging", TIMM, 0.01, why=ROLL_FIRST),
    Disagreement("100, window 5, odd maps at merging", HUGGING_FACE, 0.01, why="windows are clipped to 25, 12, 6, 3"),
    Disagreement("50, window 4, patches beyond the image", TIMM, 0.01, why="drops pixels that fill no patch"),
    Disagreement("50, window 4, patches beyond the image", HUGGING_FACE, 0.01, why=PADDING_SEEN),
    Disagreement("50, window 4, patches beyond the image", TORCHVISION, 0.01, why="drops pixels that fill no patch"),
    Disagreement("64, window 4, last map 2", TORCHVISION, 0.01, why="never clips a window; " + PADDING_SEEN),
    Disagreement("32, window 4, last map 1, pretrained window 1", HUGGING_FACE, None, "is not a number", "0 / 0"),
    Disagreement("16, window 4, two maps of 1", HUGGING_FACE, None, "RuntimeError", "takes the map for 0 x 0"),
    Disagreement("32, window 4, pretrained windows 3", TORCHVISION, 0.01, why="has no pretrained windows"),
    Disagreement("16, window 1", TORCHVISION, None, "is not a number", "0 / 0"),
    Disagreement("64x96, window (4, 6)", HUGGING_FACE, None, "StrictDataclassFieldValidationError", "one number only"),
    Disagreement("made for 64, run at 128", TIMM, None, "AssertionError", "refuses another size unless told"),
    Disagreement("made for 64, run at 128", TIMM_ANY_SIZE, 0.01, why=FROZEN),
    Disagreement("made for 64, run at 128", HUGGING_FACE, 0.01, why=FROZEN),
    Disagreement("made for 128, run at 64", TIMM_ANY_SIZE, 0.01, why=FROZEN),
    Disagreement("made for 128, run at 64", HUGGING_FACE, 0.01, why=FROZEN),
)


def peer_logits(peer: Peer, case: Case) -> Tensor | str:
    """A peer's logits with our random weights, or the name of the error that it raises."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peer.outputs(peer.model(case), random_images(case))["logits"]
    except Exception as error:
        return type(error).__name__


# --- a mask that leaks ------------------------------------------------------------------------------------------------

#: One stage of two blocks, whose second is shifted: a map of 8x8 in windows of 4.
LEAK_CASE = Case((8, 8), 4, (2,), (1,), 4, patch=1)


def leaking_weights() -> dict[str, Tensor]:
    """A shifted block in which every token looks for its opposite, at the largest multiplier; the rest is at rest.

    In an image of ones and minus ones tokens are some vector or its negative. Every query is that vector and keys are
    the tokens' negatives: where all tokens of a tile are the vector, a query scores -100 with each of them and +100
    with the negatives that the roll brings beside them.
    """
    weights = {name: torch.zeros_like(value) for name, value in weights_of(LEAK_CASE).items()}
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64)
    weights["patch_embed.proj.weight"][:, 0, 0, 0] = pattern
    for block in ("layers.0.blocks.0.", "layers.0.blocks.1."):
        weights[block + "attn.q_bias"] = pattern
        weights[block + "attn.qkv.weight"] = torch.cat((0 * identity, -identity, identity))
        weights[block + "attn.proj.weight"] = identity
        weights[block + "attn.logit_scale"].fill_(LARGEST_LOGIT_SCALE)
    for name in ("patch_embed.norm.weight", "norm.weight", "layers.0.blocks.1.norm1.weight"):
        weights[name].fill_(1.0)
    weights["head.weight"] = torch.eye(5, 4, dtype=torch.float64)
    return weights


def two_part_image() -> Tensor:
    """-1 in the two columns that the roll moves from the left border to the right one, 1 elsewhere."""
    image = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    image[..., :2] = -1
    return image
