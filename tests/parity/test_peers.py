"""Square inputs that divide, random weights: timm, Hugging Face and torchvision give our numbers and our gradients."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from swinv2_scale.config.model import VARIANTS
from tests.parity.cases import TOLERANCE, Case, Result, difference, our_result, variant_case
from tests.parity.peers import HUGGING_FACE, TIMM, TORCHVISION, Peer

torch.set_num_threads(1)

#: First maps of a power of two (or 7 times one) windows; the last stages are clipped but for window 7.
WINDOWS = {4: 8, 7: 28, 8: 16, 12: 24, 16: 32, 24: 48}

WINDOW_CASES = {
    f"window {window}, pretrained windows {'unset' if pretrained is None else pretrained}": Case(
        (2 * side, 2 * side), window, (2, 2, 2), (1, 2, 4), 16, patch=2, pretrained=pretrained
    )
    for window, side in WINDOWS.items()
    for pretrained in (None, (12, 8, 5))
}
VARIANT_CASES = {f"{variant}, window 4": variant_case(variant, 4) for variant in VARIANTS}
CLAMP_CASES = {
    "every temperature at its limit": Case((64, 64), 8, (2, 2), (1, 2), 32, all_at_clamp=True),
    "every temperature at its limit, clipped stage": Case((64, 64), 8, (2, 2, 2), (1, 2, 4), 32, all_at_clamp=True),
}
SQUARE_CASES = {**WINDOW_CASES, **VARIANT_CASES, **CLAMP_CASES}

#: What timm alone takes as we do: it clips and shifts each axis on its own.
TIMM_CASES = {
    "64x128, window 8": Case((64, 128), 8, (2, 2, 2, 2), (1, 2, 4, 8), 16),
    "128x64, window 4": Case((128, 64), 4, (2, 2, 2, 2), (1, 2, 4, 8), 16),
    "64x96, window (4, 6)": Case((64, 96), (4, 6), (2, 2, 2), (1, 2, 4), 16),
    "1x1 last stage": Case((32, 32), 4, (2, 2, 2, 2), (1, 2, 4, 8), 16),
    "1x1 last stage, pretrained window 1": Case((32, 32), 4, (2, 2, 2, 2), (1, 2, 4, 8), 16, pretrained=(4, 4, 2, 1)),
}

#: torchvision never clips and has no pretrained windows: every map is at least a window here.
TORCHVISION_CASES = {
    **{f"{variant}, window 2": variant_case(variant, 2) for variant in ("tiny", "giant")},
    **{f"window {window}": Case((4 * window, 4 * window), window, (2, 2), (1, 2), 16, patch=2) for window in WINDOWS},
    "every temperature at its limit": CLAMP_CASES["every temperature at its limit"],
}

COMPARISONS: dict[tuple[str, str], tuple[Peer, Case]] = {
    **{(TIMM.package, name): (TIMM, case) for name, case in {**SQUARE_CASES, **TIMM_CASES}.items()},
    **{(HUGGING_FACE.package, name): (HUGGING_FACE, case) for name, case in SQUARE_CASES.items()},
    **{(TORCHVISION.package, name): (TORCHVISION, case) for name, case in TORCHVISION_CASES.items()},
}


@lru_cache(maxsize=2)
def ours(case: Case) -> Result:
    return our_result(case)


#: One case after the other, so that ours is computed once for all peers.
@pytest.mark.parametrize(("package", "name"), sorted(COMPARISONS, key=lambda key: (key[1], key[0])))
def test_outputs_and_all_gradients_are_those_of_the_peer(package: str, name: str) -> None:
    peer, case = COMPARISONS[package, name]
    found = difference(peer.in_its_names(ours(case)), peer.result(case))
    assert found.output <= TOLERANCE, found
    assert found.gradient <= TOLERANCE, found
