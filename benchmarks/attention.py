"""A block with W-MSA and one with SW-MSA, forward and backward: our backends against everybody's blocks.

    .venv/bin/python benchmarks/attention.py > benchmarks/results/attention_HARDWARE_YYYYMM.md

96 channels, 3 heads, a map of 96x96 tokens, one image, MLPs included (facts/performance.md, 2.2). Times are taken in
turns and are medians; "cpu" is processor seconds of all threads, and ratios are of those with one thread, else of wall
time. Kept is what autograd holds between forward and backward; peak what a step adds to the process, each case in one
of its own. bf16 is autocast. Microsoft's block is measured where --microsoft names a checkout of its code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import MIB, Times, apart, in_turns, peak_over_base, print_header, print_table, saved_bytes
from torch import Tensor, nn

from swinv2_scale import dist
from swinv2_scale.models.block import Block
from swinv2_scale.models.linear import choose
from swinv2_scale.models.ops.attend import resolve

DIM, HEADS, SIDE = 96, 3, 96
OURS = ("eager", "sequential", "sdpa", "fused")
PEERS = ("timm", "transformers", "torchvision", "microsoft")


class OurPair(nn.Module):
    def __init__(self, window: int, backend: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                dim=DIM,
                num_heads=HEADS,
                window_size=(window, window),
                pretrained_window=(window, window),
                attend=resolve(backend, 256 * MIB),
                library=choose(),
                mlp_ratio=4.0,
                drop_path=0.0,
                index=index,
                shifted=index == 1,
                extra_norm=False,
            )
            for index in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, (SIDE, SIDE))
        return x


class PeerPair(nn.Module):
    """Two blocks of somebody else; ``call`` is how one of them is called."""

    def __init__(
        self, make: Callable[[int], nn.Module], window: int, call: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make(shift) for shift in (0, window // 2))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def timm_pair(window: int) -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    def make(shift: int) -> nn.Module:
        return SwinTransformerV2Block(DIM, (SIDE, SIDE), HEADS, window_size=window, shift_size=shift)

    return PeerPair(make, window, lambda block, x: block(x.view(1, SIDE, SIDE, DIM)).view(1, SIDE * SIDE, DIM))


def transformers_pair(window: int) -> nn.Module:
    from transformers import Swinv2Config
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    config = Swinv2Config(window_size=window, mlp_ratio=4.0)

    def make(shift: int) -> nn.Module:
        return Swinv2Layer(config, DIM, (SIDE, SIDE), HEADS, shift_size=shift)

    return PeerPair(make, window, lambda block, x: block(x, (SIDE, SIDE))[0])


def torchvision_pair(window: int) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformerBlockV2

    def make(shift: int) -> nn.Module:
        return SwinTransformerBlockV2(DIM, HEADS, [window, window], [shift, shift])

    return PeerPair(make, window, lambda block, x: block(x.view(1, SIDE, SIDE, DIM)).view(1, SIDE * SIDE, DIM))


def microsoft_pair(window: int, path: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("microsoft", Path(path) / "models" / "swin_transformer_v2.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(shift: int) -> nn.Module:
        block: nn.Module = module.SwinTransformerBlock(
            dim=DIM, input_resolution=(SIDE, SIDE), num_heads=HEADS, window_size=window, shift_size=shift
        )
        return block

    return PeerPair(make, window, lambda block, x: block(x))


def build(name: str, window: int, microsoft: str | None) -> nn.Module:
    torch.manual_seed(0)
    if name in OURS:
        pair = OurPair(window, name)
        for parameter in pair.parameters():  # ours come without values
            nn.init.normal_(parameter, std=0.02)
    elif name == "microsoft":
        pair = microsoft_pair(window, microsoft or "")
    else:
        pair = {"timm": timm_pair, "transformers": transformers_pair, "torchvision": torchvision_pair}[name](window)
    return pair.train()


def make_step(name: str, window: int, dtype: str, microsoft: str | None, backward: bool = True) -> tuple[Any, Any, Any]:
    """(step, forward alone, what is there before: parameters, buffers, the input)."""
    pair = build(name, window, microsoft)
    x = torch.randn(1, SIDE * SIDE, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            out: Tensor = pair(x)
        return out

    def step() -> None:
        if not backward:
            with torch.no_grad():
                forward()
            return
        for parameter in (*pair.parameters(), x):
            parameter.grad = None
        forward().float().square().mean().backward()

    return step, forward, [*pair.parameters(), *pair.buffers(), x]


def measure_memory(case: list[str]) -> None:
    """kept and peak bytes of one case, as JSON."""
    name, window, dtype, microsoft = case
    torch.set_num_threads(1)
    step, forward, given = make_step(name, int(window), dtype, microsoft)
    peak = peak_over_base(step)
    print(json.dumps({"kept": saved_bytes(forward, given), "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", type=int, default=[8, 16, 24, 32, 48])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--names", nargs="+", default=["eager", "sequential", "sdpa", "fused", *PEERS[:3]])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microsoft", metavar="DIR", help="a checkout of microsoft/Swin-Transformer")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--keep", action="store_true", help="malloc keeps freed memory, for all (dist.keep_freed_memory)"
    )
    parser.add_argument("--raw", type=Path, help="a JSON file for every number")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure_memory(arguments.case)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.keep:
        dist.keep_freed_memory()
    names = [*arguments.names, *(["microsoft"] if arguments.microsoft else [])]
    print_header("Attention: two blocks, forward and backward", ("torch", "timm", "transformers", "torchvision"))
    print(
        f"- {arguments.rounds} rounds in turns, medians; {DIM} channels, {HEADS} heads, {SIDE}x{SIDE} tokens, 1 image"
    )
    raw: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        print(f"\n## {dtype}")
        print_table(
            (
                "window",
                "what",
                "forward, s",
                "both, cpu s",
                "both, wall s",
                "timm's time / this",
                "kept, MiB",
                "peak, MiB",
            ),
            (row for window in arguments.windows for row in rows(names, window, dtype, arguments, raw)),
        )
    if arguments.raw:
        arguments.raw.write_text(json.dumps(raw, indent=1))


def rows(
    names: list[str], window: int, dtype: str, arguments: argparse.Namespace, raw: list[dict[str, Any]]
) -> list[list[object]]:
    """One row a block, as they are compared with each other."""
    both: dict[str, Times] = {}
    forward: dict[str, Times] = {}
    for backward, into in ((False, forward), (True, both)):
        steps = {n: make_step(n, window, dtype, arguments.microsoft, backward)[0] for n in names}
        into |= in_turns(steps, arguments.rounds)
    of = "cpu" if arguments.threads == 1 else "wall"
    found: list[list[object]] = []
    for name in names:
        case = [name, str(window), dtype, arguments.microsoft or ""]
        memory = {} if arguments.no_memory else apart(__file__, case)
        ratio = both[name].ratio_to(both["timm"], of) if "timm" in both else float("nan")
        numbers = [forward[name].summary[of], both[name].summary["cpu"], both[name].summary["wall"]]
        sizes = [f"{memory[key] / MIB:.0f}" if memory else "-" for key in ("kept", "peak")]
        found.append([window, name, *(f"{x:.3f}" for x in numbers), f"{ratio:.2f}", *sizes])
        record = {"window": window, "dtype": dtype, "name": name, "threads": arguments.threads, "keep": arguments.keep}
        raw.append(record | memory | {"forward": vars(forward[name]), "both": vars(both[name])})
    return found


if __name__ == "__main__":
    sys.exit(main())
