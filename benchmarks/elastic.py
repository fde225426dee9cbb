"""A checkpoint of 1, 2 or 4 processes, restored by 1, 2 and 4, and at other ZeRO stages: what is the same, and how far.

    .venv/bin/python benchmarks/elastic.py > benchmarks/results/elastic_HARDWARE_YYYYMM.md

The jobs of tests/distributed/test_elastic.py: a small Swin V2 with everything on (ZeRO-3, bf16, recomputed activations,
drop path, masks, a moving average), trained two steps, saved, restored, saved again at once, and trained one step more.
Compared are all masters, moments and averages, bit for bit, and the next step with the one that the saving job took.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path

from machine import describe_machine, describe_versions

sys.path.insert(0, str(Path(__file__).parents[1]))

from swinv2_scale.data.sources.embedded import embedded_shards
from tests.distributed.test_elastic import LAYOUTS, WORLDS, Saved
from tests.support.small_run import write_config


def main() -> int:
    print("# Resuming on another number of processes\n")
    print(f"- machine: {describe_machine()}")
    print(f"- versions: {describe_versions('torch', 'deepspeed')}")
    print("- command: `.venv/bin/python benchmarks/elastic.py`\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "validation"):
            embedded_shards(f"embedded:fashion-mnist/{split}", folder / "shards")
        saved = Saved(folder, write_config(folder, folder / "shards", **{"depths: [2, 2]": "depths: [1, 1]"}))
        print("| saved by | restored by | masters, moments, average | samples of the next step | its loss, relative |")
        print("|---|---|---|---|---|")
        pairs = [(old, new, f"{new}-from-{old} 3 bf16 {saved.path(old)}") for old, new in product(WORLDS, WORLDS)]
        are_good = [row(saved, old, new, "3 bf16", case) for old, new, case in pairs]
        for layout in LAYOUTS:
            are_good.append(row(saved, 2, 2, layout, f"{layout.replace(' ', '-')} {layout} {saved.path(2)}"))
    print("\nThe loss may differ by the order in which the means of samples are added; at another precision it must.")
    return int(not all(are_good))


def row(saved: Saved, old: int, new: int, layout: str, case: str) -> bool:
    """One line of the table; whether it is as promised."""
    unbroken, restored = saved.sources[old][f"of-{old} 3 bf16"], saved.restored[new][case]
    ours, theirs = saved.tensors(restored["checkpoint"]), saved.tensors(saved.path(old))
    tensors = list(product(ours.shapes, sorted(ours.kinds)))
    num_equal = sum(ours.tensor(*which).equal(theirs.tensor(*which)) for which in tensors)
    has_same_samples = restored["data_digest"] == unbroken["data_digest"]
    difference = abs(restored["loss"] - unbroken["loss"]) / unbroken["loss"]
    stage, precision = layout.split()
    to = f"{new}" if layout == "3 bf16" else f"{new}, stage {stage}, {precision}"
    equal = f"{num_equal} of {len(tensors)} equal"
    print(f"| {old} | {to} | {equal} | {'the same' if has_same_samples else 'OTHERS'} | {difference:.1e} |", flush=True)
    return num_equal == len(tensors) and has_same_samples and (difference <= 1e-6 or precision != "bf16")


if __name__ == "__main__":
    sys.exit(main())
