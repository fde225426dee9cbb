"""How far our numbers are from other libraries' and from the definition, in float64 with random weights:

    .venv/bin/python benchmarks/parity.py > benchmarks/results/parity_HARDWARE_YYYYMM.md

Runs the comparisons of tests/parity and prints a Markdown page with the largest relative difference of each,
max |ours - theirs| / max |theirs| over one tensor: of any output (stage maps, pooled features, logits), and of any
parameter's gradient.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from machine import describe_machine, describe_versions

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.parity import test_definition, test_peers, test_simmim_loss
from tests.parity.cases import (
    TOLERANCE,
    difference,
    our_outputs,
    our_random_model,
    our_result,
    random_images,
    weights_of,
)
from tests.parity.cases import relative_difference as relative
from tests.parity.definition import classify
from tests.parity.disagreements import (
    CASES,
    DISAGREEMENTS,
    LEAK_CASE,
    leaking_weights,
    peer_logits,
    two_part_image,
)
from tests.parity.peers import HUGGING_FACE, TIMM, TORCHVISION
from tests.parity.simmim import simmim_difference

PACKAGES = ("torch", "timm", "transformers", "torchvision", "numpy")


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    print("# Parity\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions(*PACKAGES)}")
    print(f"- command: `python benchmarks/parity.py`, {torch.get_num_threads()} thread, float64, random weights\n")
    peers()
    simmim()
    definition()
    disagreements()
    print(f"\nAll of it took {time.monotonic() - started:.0f} s.")


def heading(title: str, *columns: str) -> None:
    print(f"\n## {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: str | float) -> None:
    print("| " + " | ".join(f"{x:.1e}" if isinstance(x, float) else x for x in cells) + " |", flush=True)


def peers() -> None:
    """Inputs on which a peer and we should give the same numbers."""
    heading("Peers", "comparison", "case", "output", "gradients", "gradient that differs most", "tolerance")
    for (package, name), (peer, case) in test_peers.COMPARISONS.items():
        found = difference(peer.in_its_names(test_peers.ours(case)), peer.result(case))
        row(f"ours - {package}", name, found.output, found.gradient, f"`{found.worst_gradient}`", TOLERANCE)


def simmim() -> None:
    heading("SimMIM, against transformers", "case", "prediction", "loss", "gradients", "tolerance")
    for name, case in test_simmim_loss.CASES.items():
        found = simmim_difference(case)
        row(name, found["prediction"], found["loss"], found["gradient"], TOLERANCE)


def definition() -> None:
    heading("The definition, token by token", "comparison", "case", "output", "gradients", "tolerance")
    for name, case in test_definition.CASES.items():
        for backend, fields in test_definition.BACKENDS.items():
            found = difference(our_result(case, **fields), test_definition.defined(case))
            row(f"{backend} - definition", name, found.output, found.gradient, TOLERANCE)


def disagreements() -> None:
    """Logits alone: peers differ there already."""
    heading(
        "Where peers disagree or fail", "case", "peer", "peer - definition", "ours - definition", "what the peer does"
    )
    for one in DISAGREEMENTS:
        case = CASES[one.case]
        images = random_images(case)
        with torch.no_grad():
            defined = classify(case, weights_of(case), images)["logits"]
            ours = relative(our_random_model(case)(images), defined)
        theirs = peer_logits(one.peer, case)
        found = theirs if isinstance(theirs, str) else f"{relative(theirs, defined):.2g}"
        row(one.case, one.peer.package, found, ours, one.why)
    heading("A shifted block whose tokens look for their opposites, at a multiplier of 100", "comparison", "its output")
    weights, image = leaking_weights(), two_part_image()
    with torch.no_grad():
        defined = classify(LEAK_CASE, weights, image)["level 0"]
        row("ours - definition", relative(our_outputs(our_random_model(LEAK_CASE, weights), image)["level 0"], defined))
        for peer in (TIMM, HUGGING_FACE, TORCHVISION):
            found = peer.outputs(peer.model(LEAK_CASE, weights), image)["level 0"]
            row(f"{peer.package} - definition", f"{relative(found, defined):.2g}")


if __name__ == "__main__":
    main()
