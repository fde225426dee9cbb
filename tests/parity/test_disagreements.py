"""Where a peer disagrees or fails, ours is the definition: what docs/numerics.md says of each peer, as it is today.

A test that fails here because a library was mended is good news: the case then moves to test_peers.py.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import swin_v2_t
from transformers import Swinv2ForImageClassification, Swinv2ForMaskedImageModeling

from swinv2_scale.models.factory import initialise
from tests.parity.cases import (
    TOLERANCE,
    Case,
    our_model,
    our_outputs,
    our_random_model,
    random_images,
    relative_difference,
    weights_of,
)
from tests.parity.definition import classify, simmim_prediction
from tests.parity.disagreements import (
    CASES,
    DISAGREEMENTS,
    LEAK_CASE,
    Disagreement,
    leaking_weights,
    peer_logits,
    two_part_image,
)
from tests.parity.peers import HUGGING_FACE, TIMM, TORCHVISION, Peer, hf_config
from tests.parity.simmim import UNIT, hf_loss, hf_simmim, images_and_mask, our_simmim

torch.set_num_threads(1)


@cache
def defined_logits(case: Case) -> Tensor:
    with torch.no_grad():
        return classify(case, weights_of(case), random_images(case))["logits"]


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_definition(name: str) -> None:
    case = CASES[name]
    model = our_random_model(case)
    with torch.no_grad():
        assert relative_difference(model(random_images(case)), defined_logits(case)) <= TOLERANCE


@pytest.mark.parametrize("one", DISAGREEMENTS, ids=lambda one: f"{one.peer.package}: {one.case}")
def test_the_peer_does_something_else(one: Disagreement) -> None:
    case = CASES[one.case]
    found = peer_logits(one.peer, case)
    if one.outcome == "differs":
        assert isinstance(found, Tensor)
        assert found.isfinite().all()
        assert one.at_least is not None
        assert relative_difference(found, defined_logits(case)) > one.at_least
    elif one.outcome == "is not a number":
        assert isinstance(found, Tensor)
        assert found.isnan().all()
    else:
        assert found == one.outcome


@pytest.mark.parametrize("peer", [TIMM, HUGGING_FACE, TORCHVISION], ids=lambda peer: peer.package)
def test_a_finite_mask_leaks_at_the_largest_temperature_and_tiles_do_not(peer: Peer) -> None:
    weights, image = leaking_weights(), two_part_image()
    model = our_random_model(LEAK_CASE, weights)
    with torch.no_grad():
        wanted = classify(LEAK_CASE, weights, image)
        found = our_outputs(model, image)
        theirs = peer.outputs(peer.model(LEAK_CASE, weights), image)
    for name, value in found.items():
        assert relative_difference(value, wanted[name]) <= TOLERANCE
    # The last two columns see ones alone; the roll brings them beside minus ones. With scores of -100 and +100 a mask
    # of -100 leaves all of the weight with those, one of -200 half of it: what is added, the norm of a one less all or
    # half of two, then takes the ones away.
    torch.testing.assert_close(found["level 0"][0, 0, :, 6:], torch.ones(8, 2, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (theirs["level 0"][0, 0, :, 6:] < 0.1).any()


@pytest.mark.parametrize("peer", [TIMM, HUGGING_FACE, TORCHVISION], ids=lambda peer: peer.package)
def test_in_half_precision_a_zero_key_is_not_a_number_in_a_peer_and_zero_in_ours(peer: Peer) -> None:
    # Padding makes zero tokens, keys have no bias, and 1e-12 is zero in half precision: 0 / 0. Ours pads nothing, and
    # a zero token of the image's own does no harm.
    case = CASES["80x80, window 6 (map 20)"]
    weights = {name: value.clone() for name, value in weights_of(case).items()}
    for name, value in weights.items():
        if name.endswith("blocks.0.attn.qkv.weight"):
            value.chunk(3)[1].zero_()
    images = random_images(case).half()
    model = our_random_model(case, weights)
    with torch.no_grad():
        exact = model(images.double())
        # Half precision rounds at 5e-4; four blocks.
        assert relative_difference(model.half()(images).double(), exact) < 0.02
        assert peer.outputs(peer.model(case, weights).half(), images)["logits"].isnan().all()


# --- SimMIM -----------------------------------------------------------------------------------------------------------

WIDE = Case((32, 64), 4, (2, 2, 2), (2, 4, 8), 32)


def test_simmim_on_images_that_are_not_square_is_the_definition_and_hugging_face_raises() -> None:
    ours = our_simmim(WIDE)
    images, hidden = images_and_mask(WIDE)
    pixels = ours.normalised(images).double()
    repeat = UNIT // WIDE.patch
    with torch.no_grad():
        _, made = ours(images, hidden, decode_all=True)
    weights = {name.removeprefix("encoder."): value for name, value in ours.state_dict().items()}
    with torch.no_grad():
        for sample in range(2):
            places = {
                (repeat * int(y) + down, repeat * int(x) + across)
                for y, x in hidden[sample].nonzero()
                for down in range(repeat)
                for across in range(repeat)
            }
            wanted = simmim_prediction(WIDE, weights, pixels[sample : sample + 1], places)
            assert relative_difference(made[sample : sample + 1], wanted) <= TOLERANCE
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            hf_loss(WIDE, hf_simmim(WIDE, ours), pixels, hidden)


def test_hugging_faces_first_mask_token_is_zero_and_its_first_gradient_explodes() -> None:
    case = Case((64, 64), 4, (2, 2, 2), (2, 4, 8), 32)
    ours = our_simmim(case).float()
    initialise(ours, 0)
    torch.manual_seed(0)
    peer = Swinv2ForMaskedImageModeling(hf_config(case))
    images, hidden = images_and_mask(case)
    ours(images, hidden)[0].mean().backward()
    hf_loss(case, peer, ours.normalised(images), hidden)[0].backward()
    assert not peer.swinv2.embeddings.mask_token.any()
    assert ours.mask_token.all()
    # Measured: 0.1 and 5e14. A row of zero tokens gives zero keys, and normalising divides by 1e-12.
    assert largest_gradient(ours) < 10
    assert largest_gradient(peer) > 1e9


def largest_gradient(model: nn.Module) -> float:
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


# --- first values -----------------------------------------------------------------------------------------------------


def test_fresh_blocks_are_the_identity_in_ours_and_in_timm_alone() -> None:
    case = Case((32, 32), 4, (2, 2), (2, 4), 32)
    fresh = {"ours": our_model(case), **{peer.package: peer.build(case) for peer in (TIMM, HUGGING_FACE)}}
    ends = ("norm1.weight", "norm2.weight", "layernorm_before.weight", "layernorm_after.weight")

    def gains_of(model: nn.Module) -> set[float]:
        named = [p.detach() for name, p in model.named_parameters() if "blocks" in name and name.endswith(ends)]
        assert len(named) == 8
        return set(torch.cat(named).tolist())

    gains = {name: gains_of(model) for name, model in fresh.items()}
    assert gains == {"ours": {0.0}, "timm": {0.0}, "transformers": {1.0}}
    assert all((p == 1).all() for name, p in swin_v2_t().named_parameters() if name.endswith("norm1.weight"))
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(fresh["ours"].layers[0](x, (8, 8)), x)


def test_hugging_face_cannot_add_absolute_positions_at_all() -> None:
    config = hf_config(Case((32, 32), 4, (2, 2), (2, 4), 32))
    config.use_absolute_embeddings = True
    with pytest.raises(RuntimeError, match="must match"):
        Swinv2ForImageClassification(config)(torch.zeros(1, 3, 32, 32))
