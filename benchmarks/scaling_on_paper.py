"""How speed and cost of pre-training T, B and G change with the number of nodes, on paper.

    .venv/bin/python benchmarks/scaling_on_paper.py           writes tables, picture, their parts of docs/scaling.md
    .venv/bin/python benchmarks/scaling_on_paper.py --check   says whether they are what it would write (a test asks)

Nothing here is measured: it is the model of swinv2_scale/plan/ (traffic counted on live DeepSpeed engines, arithmetic
counted from the configuration) with the rates below. When somebody has run benchmarks/gpu.py, put its rate into
EFFICIENCY and run this again.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from pages import filled

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.run import RunConfig
from swinv2_scale.plan.fit import changed, memory
from swinv2_scale.plan.machines import DEVICES, Cluster
from swinv2_scale.plan.speed import LATENCY_PER_DOUBLING_S, LATENCY_S, OVERLAP, Speed, speed
from swinv2_scale.plan.zero import Sharding, checkpoint_bytes

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "scaling.md"
PICTURE = REPOSITORY / "docs" / "images" / "scaling.svg"
RESULTS = REPOSITORY / "benchmarks" / "results" / "scaling_on_paper_202611.md"
MARK = "<!-- benchmarks/scaling_on_paper.py: {} -->"

CONFIGS = {
    "T": "configs/stages/tiny/simmim_192w12.yaml",
    "B": "configs/stages/base/simmim_192w12.yaml",
    "G": "configs/stages/giant/simmim_192w12.yaml",
}
#: Share of the peak rate that arithmetic reaches; ours is an assumption for each.
EFFICIENCY = {"a100": 0.4, "h100": 0.35, "h200": 0.35}
#: Gbit/s of a node of eight: one adapter of 200 or 400 Gbit/s a GPU, and plain Ethernet.
NETWORKS = {"a100": (1600, 100), "h100": (3200, 100), "h200": (3200, 100)}
NODES = tuple(2**n for n in range(8))
GPUS_PER_NODE = 8
HPZ = "engine.deepspeed_overrides.zero_optimization.zero_hpz_partition_size"
STRATEGIES = {
    "ZeRO-1": {"engine.zero_stage": 1},
    "ZeRO-2": {"engine.zero_stage": 2},
    "ZeRO-3": {"engine.zero_stage": 3},
    "ZeRO-3, hpZ": {"engine.zero_stage": 3, HPZ: GPUS_PER_NODE},
}
#: A node that pays has at least this share of the speed that it would have alone.
PAYS = 0.8
#: Unplanned stops of 16,384 GPUs on 2,048 nodes in 54 days: Llama 3 (arXiv 2407.21783), sec. 3.3.4.
STOPS, STOPS_NODES, STOPS_DAYS = 419, 2048, 54
RESTART_S, STALL_S = 600, 5.0


@dataclass(frozen=True)
class Point:
    """One run on so many nodes."""

    nodes: int
    micro_batch: int
    speed: Speed
    memory_bytes: int
    fits: bool
    steps: int

    @property
    def days(self) -> float:
        return self.steps * self.speed.step_s / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.nodes * GPUS_PER_NODE


def point(config: RunConfig, strategy: str, device: str, network: int, nodes: int) -> Point | None:
    """The recipe's global batch on so many nodes; None where it has fewer images than there are GPUs."""
    cluster = Cluster(DEVICES[device], nodes * GPUS_PER_NODE, nodes, network, EFFICIENCY[device])
    per_gpu, rest = divmod(config.data.global_batch_size, cluster.gpus)
    if rest:
        return None
    micro = max(n for n in range(1, config.data.micro_batch_size + 1) if per_gpu % n == 0)
    config = changed(config, {**STRATEGIES[strategy], "data.micro_batch_size": micro})
    total = memory(config, cluster.gpus).total
    found = speed(config, cluster)
    return Point(nodes, micro, found, total, total <= cluster.device.memory_bytes, config.optim.total_steps)


def curves(config: RunConfig, device: str, network: int) -> dict[str, list[Point]]:
    """Of every strategy, over the numbers of nodes that the batch can be dealt to."""
    return {
        name: [found for nodes in NODES if (found := point(config, name, device, network, nodes))]
        for name in STRATEGIES
    }


def table(found: dict[str, list[Point]]) -> list[str]:
    """Efficiency against a GPU that waits for nobody, images/s and days; ``*`` where memory is too small."""
    names = list(found)
    lines = ["| nodes | images a GPU at once | " + " | ".join(names) + " | images/s, days, GPU-hours of the best |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in zip(*found.values(), strict=True):
        cells = [f"{p.speed.scaling:.0%}{'' if p.fits else '*'}" for p in row]
        best = max((p for p in row if p.fits), key=lambda p: p.speed.images_per_s, default=None)
        summary = f"{best.speed.images_per_s:,.0f}, {best.days:,.1f}, {best.gpu_hours:,.0f}" if best else "none fits"
        lines.append(f"| {row[0].nodes} | {row[0].micro_batch} | " + " | ".join(cells) + f" | {summary} |")
    return lines


def last_that_pays(found: list[Point]) -> str:
    paying = [p.nodes for p in found if p.fits and p.speed.scaling >= PAYS]
    if not paying:
        return "none" if any(p.fits for p in found) else "too large"
    return f"{max(paying)}" + (" and more" if max(paying) == found[-1].nodes else "")


def limits(configs: dict[str, RunConfig]) -> list[str]:
    """Up to how many nodes each pays."""
    lines = [
        "| model | GPUs, network of a node | " + " | ".join(STRATEGIES) + " |",
        "|---" * (len(STRATEGIES) + 2) + "|",
    ]
    for name, config in configs.items():
        for device, networks in NETWORKS.items():
            for network in networks:
                found = curves(config, device, network)
                cells = " | ".join(last_that_pays(points) for points in found.values())
                lines.append(f"| {name} | {device}, {network} Gbit/s | {cells} |")
    return lines


def failures(config: RunConfig) -> list[str]:
    """Young's interval between checkpoints, and what stops cost, of G."""
    lines = ["| nodes | hours between stops | minutes between checkpoints | time lost | checkpoint, one process |"]
    lines.append("|---|---|---|---|---|")
    for nodes in (8, 64, 128, 1000):
        between_s = STOPS_DAYS * 86400 / STOPS * STOPS_NODES / nodes
        interval_s = math.sqrt(2 * STALL_S * between_s)
        lost = STALL_S / interval_s + interval_s / 2 / between_s + RESTART_S / between_s
        gpus = nodes * GPUS_PER_NODE
        total, largest = checkpoint_bytes(Sharding.of(config, gpus))
        lines.append(
            f"| {nodes:,} | {between_s / 3600:.1f} | {interval_s / 60:.0f} | {lost:.1%} | "
            f"{total / 2**30:.1f} GiB in {3 * gpus:,} files, {largest / 2**20:.1f} MiB |"
        )
    return lines


def picture(panels: dict[str, dict[str, list[Point]]]) -> str:
    """Efficiency against nodes, one panel a network, as SVG."""
    colours = dict(zip(STRATEGIES, ("#1b6ca8", "#2a9d5c", "#c0392b", "#8e44ad"), strict=True))
    width, height, left, top = 330, 220, 50, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (width + 70)}" height="{height + 110}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, (title, found) in enumerate(panels.items()):
        x0 = left + number * (width + 70)
        parts.append(f'<text x="{x0}" y="{top - 18}" font-weight="bold">{title}</text>')
        for share in range(0, 101, 20):
            y = top + height * (1 - share / 100)
            parts.append(f'<path d="M{x0} {y:.0f}h{width}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 - 8}" y="{y + 4:.0f}" text-anchor="end">{share}%</text>')
        for exponent, nodes in enumerate(NODES):
            x = x0 + width * exponent / (len(NODES) - 1)
            parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{nodes}</text>')
        parts.append(f'<text x="{x0 + width / 2}" y="{top + height + 36}" text-anchor="middle">nodes of 8 GPUs</text>')
        for name, points in found.items():
            places = [
                (x0 + width * math.log2(p.nodes) / (len(NODES) - 1), top + height * (1 - p.speed.scaling))
                for p in points
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    for number, (name, colour) in enumerate(colours.items()):
        x, y = left + 160 * number, top + height + 60
        parts.append(
            f'<path d="M{x} {y - 4}h24" stroke="{colour}" stroke-width="3"/><text x="{x + 30}" y="{y}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def assumed() -> list[str]:
    lines = [
        "| GPU | memory | 16-bit peak, reached | to GPUs of the node, each way | network of a node |",
        "|---" * 5 + "|",
    ]
    for name, share in EFFICIENCY.items():
        device = DEVICES[name]
        rates = " or ".join(f"{rate}" for rate in NETWORKS[name])
        lines.append(
            f"| {name} | {device.memory_bytes / 2**30:.0f} GiB | {device.tflops_16bit:g} TFLOP/s, {share:.0%} | "
            f"{device.link_gb_s:g} GB/s | {rates} Gbit/s |"
        )
    lines.append("")
    lines.append(
        f"Each collective costs {LATENCY_S * 1e6:g} us and {LATENCY_PER_DOUBLING_S * 1e6:g} more for each doubling of "
        f"nodes; up to {OVERLAP:.0%} of the arithmetic that it may go on behind hides it."
    )
    return lines


def sections() -> dict[str, list[str]]:
    """What the script writes into the page, by name."""
    configs = {name: load_config(REPOSITORY / path).config for name, path in CONFIGS.items()}
    found = {"assumed": assumed(), "pays": limits(configs), "failures": failures(configs["G"])}
    for name, config in configs.items():
        for network in NETWORKS["a100"]:
            found[f"{name} {network}"] = table(curves(config, "a100", network))
    return found


def others() -> list[str]:
    """Tables that are in the results alone."""
    lines = []
    for name, path in CONFIGS.items():
        config = load_config(REPOSITORY / path).config
        for device in ("h100", "h200"):
            for network in NETWORKS[device]:
                lines += [
                    f"## {name}, {device}, {network} Gbit/s a node",
                    "",
                    *table(curves(config, device, network)),
                    "",
                ]
    return lines


def files() -> dict[Path, str]:
    """Everything that the script writes."""
    found = sections()
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in found.items():
        page = filled(page, MARK.format(name), MARK.format("end"), lines)
    results = [
        "# Scaling, on paper",
        "",
        "- command: `.venv/bin/python benchmarks/scaling_on_paper.py`; nothing is measured",
        "",
    ]
    for name, lines in found.items():
        heading = f"{name} Gbit/s a node, a100" if name[0] in CONFIGS else name
        results += [f"## {heading}", "", *lines, ""]
    giant = load_config(REPOSITORY / CONFIGS["G"]).config
    panels = {f"SwinV2-G, A100, {rate} Gbit/s a node": curves(giant, "a100", rate) for rate in NETWORKS["a100"]}
    return {PAGE: page, RESULTS: "\n".join(results + others()).rstrip() + "\n", PICTURE: picture(panels)}


def main() -> int:
    wrong = []
    for path, text in files().items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            wrong.append(str(path.relative_to(REPOSITORY)))
    if wrong:
        print(f"not what benchmarks/scaling_on_paper.py writes: {', '.join(wrong)}; run it", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
