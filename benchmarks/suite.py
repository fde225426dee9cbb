"""The benchmarks of speed on CPUs, one after another, in under 20 minutes: `make bench`.

    .venv/bin/python benchmarks/suite.py [--microsoft CHECKOUT]   measures, and writes what follows from it
    .venv/bin/python benchmarks/suite.py --check                  says whether the README has what the results say

Measures into benchmarks/results/NAME_HARDWARE_YYYYMM.{md,json,png}; then the README's table and picture are written
from those of RESULTS, the ones that are committed. A run on another machine leaves README and picture alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import Times
from machine import hardware
from pages import filled

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
PICTURE = REPOSITORY / "docs" / "images" / "speed.svg"
#: Of the results that the README shows.
RESULTS = "xeon-2core_202611"
MARKS = "<!-- benchmarks/suite.py -->", "<!-- benchmarks/suite.py: end -->"
OURS = "ours, fused"


def commands(microsoft: str | None) -> dict[str, list[str]]:
    """What is run, by name; ``{}`` is the path of its results without a suffix."""
    peer = ["--microsoft", microsoft] if microsoft else []
    pair = ["attention.py", "--names", "fused", "timm", *peer, "--rounds", "3", "--raw", "{}.json"]
    return {
        "attention": [*pair, "--dtypes", "f32", "bf16"],
        "attention_kept": [*pair, "--dtypes", "f32", "--no-memory", "--keep"],
        "attention_2threads": [*pair, "--dtypes", "f32", "--no-memory", "--threads", "2", "--windows", "48"],
        "peers": ["peers.py", "--output", "{}", "--backends", "fused", "--rounds", "3", *peer],
        "scaling": ["scaling.py", "--stages", "1", "3", "--turns", "8", "--json", "{}.json"],
        "startup": ["startup.py", "--rounds", "3", "--raw", "{}.json"],
    }


def measure(tag: str, microsoft: str | None) -> None:
    begun = time.monotonic()
    for name, words in commands(microsoft).items():
        path = FOLDER / f"{name}_{tag}"
        words = [word.replace("{}", str(path.relative_to(REPOSITORY))) for word in words]
        print(f"{(time.monotonic() - begun) / 60:4.1f} min  {' '.join(words)}", flush=True)
        command = [sys.executable, f"benchmarks/{words[0]}", *words[1:]]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stderr}\n{name} ended with {done.returncode}")
        if name != "peers":  # writes its own page
            path.with_suffix(".md").write_text(done.stdout)
    print(f"{(time.monotonic() - begun) / 60:4.1f} min  done")


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}_{RESULTS}.json").read_text())


def pairs(name: str, dtype: str, peer: str, of: str = "cpu") -> dict[int, float]:
    """By window: how many times as long the peer's pair of blocks takes."""
    found = {(row["window"], row["name"]): row for row in read(name) if row["dtype"] == dtype}
    times = {key: Times(**row["both"]) for key, row in found.items()}
    windows = sorted({window for window, _ in times})
    return {window: times[window, "fused"].ratio_to(times[window, peer], of) for window in windows}


def memory(dtype: str, peer: str) -> dict[int, tuple[float, float]]:
    """By window: how many times as much the peer keeps, and needs at most."""
    rows = {(row["window"], row["name"]): row for row in read("attention") if row["dtype"] == dtype}
    windows = sorted({window for window, _ in rows})
    return {w: tuple(rows[w, peer][key] / rows[w, "fused"][key] for key in ("kept", "peak")) for w in windows}


def steps(clock: str = "cpu") -> dict[str, tuple[str, float]]:
    """By setting: the fastest eager peer, and how many times as long its train step takes."""
    found = {}
    for setting, result in read("peers").items():
        times = {name: Times(**each) for name, each in result["train"].items()}
        peers = {name: one.summary[clock] for name, one in times.items() if name != OURS}
        best = min(peers, key=lambda name: peers[name])
        found[setting] = best, times[OURS].ratio_to(times[best], clock)
    return found


def peer_of_blocks() -> tuple[str, str]:
    """Microsoft's code where it was measured, else timm's: its key and its name."""
    has = any(row["name"] == "microsoft" for row in read("attention"))
    return ("microsoft", "Microsoft's") if has else ("timm", "timm's")


def table() -> list[str]:
    """What the README shows."""
    peer, title = peer_of_blocks()
    lines = ["| what | against | how many times as fast |", "|---|---|---|"]

    def add(what: str, against: str, found: str) -> None:
        lines.append(f"| {what} | {against} | {found} |")

    first, kept = pairs("attention", "f32", peer), pairs("attention_kept", "f32", peer)
    half, bytes_ = pairs("attention", "bf16", peer), memory("f32", peer)
    for window in first:
        found = (
            f"**x{first[window]:.2f}**; x{kept[window]:.2f} if malloc keeps memory for both; bf16 x{half[window]:.2f}"
        )
        add(f"two blocks, window {window}, float32", f"{title} blocks", found)
    (two,) = pairs("attention_2threads", "f32", peer, "wall").values()
    add("two blocks, window 48, float32, 2 threads", f"{title} blocks", f"**x{two:.2f}**")
    less = "**x{:.1f} less kept**, peak x{:.1f} less".format(*bytes_[48])
    add("two blocks, window 48, float32: memory", f"{title} blocks", less)
    for setting, (best, ratio) in steps().items():
        task, size, precision = setting.split()
        name = {"classify": "train step", "simmim": "SimMIM step"}[task]
        add(f"SwinV2-T {name}, {size}, {precision}", f"{best}, the fastest eager peer", f"**x{ratio:.2f}**")
    for name, turns in read("scaling").items():
        efficiency = statistics.median(turn["efficiency"] for turn in turns)
        add(f"2 ranks, {name}", "2 independent processes", f"{efficiency:.1%} of their images a second")
    seconds = statistics.median(each["cpu"] for each in read("startup")["launch to first step"])
    add("launch to the quick start's first step", "", f"{seconds:.1f} CPU seconds a rank")
    return lines


def picture() -> None:
    """Time and memory of two blocks by window, and of steps, as bars of how many times less ours take."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # the same bytes from the same numbers
    import matplotlib.pyplot as plt

    peer, title = peer_of_blocks()
    blocks, bytes_, whole = pairs("attention", "f32", peer), memory("f32", peer), steps()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    windows = [str(window) for window in blocks]
    panels = (
        (windows, list(blocks.values()), "two blocks, float32: time"),
        (windows, [kept for kept, _ in bytes_.values()], "two blocks, float32: memory kept"),
        (
            [name.replace("classify ", "").replace("simmim", "SimMIM") for name in whole],
            [r for _, r in whole.values()],
            "train step of SwinV2-T: time",
        ),
    )
    for axis, (names, ratios, name) in zip(axes, panels, strict=True):
        bars = axis.bar(names, ratios, color="tab:blue")
        axis.bar_label(bars, [f"x{ratio:.1f}" for ratio in ratios], fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{title} / ours", fontsize=8)
    axes[2].set_ylabel("fastest eager peer's / ours", fontsize=8)
    axes[2].tick_params(axis="x", rotation=30)
    for axis in axes[:2]:
        axis.set_xlabel("window", fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def page() -> str:
    """The README with the table that the results give."""
    return filled(README.read_text(encoding="utf-8"), *MARKS, table())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microsoft", metavar="CHECKOUT", help="a checkout of microsoft/Swin-Transformer")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--no-measure", action="store_true", help="write README and picture from what is there")
    options = parser.parse_args()
    if options.check:
        is_same = README.read_text(encoding="utf-8") == page()
        if not is_same:
            print("the README has other numbers: run benchmarks/suite.py --no-measure", file=sys.stderr)
        return not is_same
    tag = f"{hardware()}_{datetime.now(UTC):%Y%m}"
    if not options.no_measure:
        measure(tag, options.microsoft)
    if tag == RESULTS or options.no_measure:
        README.write_text(page(), encoding="utf-8")
        picture()
    return 0


if __name__ == "__main__":
    sys.exit(main())
