"""SwinV2-T of this project beside timm's, Hugging Face's, torchvision's and Microsoft's, on a CPU.

    .venv/bin/python benchmarks/peers.py --output benchmarks/results/peers_HARDWARE_YYYYMM [--microsoft CHECKOUT]

Classification at 256 px, windows 8 and 16, and SimMIM at 192 px, window 12, each in float32 and under bf16 autocast.
A train step is forward, cross-entropy (SimMIM: its own loss), backward and AdamW (torch's, fused); the same random
images, no drop path. All contenders of a setting live in one process and take turns (harness.py); the table has the
medians, of wall-clock and of CPU seconds, each with its ratio: the fastest eager peer's over the contender's. "Kept"
is what a forward holds for its backward, "peak" how far a step raises resident memory, each in a process of its own.
Peers under torch.compile take minutes to compile: --compiled adds them.

Writes OUTPUT.json (every round), OUTPUT.md and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import MIB, Times, apart, in_turns, peak_over_base, print_header, print_table, saved_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from swinv2_scale.config.loader import load_config
from swinv2_scale.models.factory import create_model, initialise
from swinv2_scale.tasks.simmim import SimMIM

SHAPE = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
PACKAGES = ("torch", "timm", "transformers", "torchvision")


@dataclass(frozen=True)
class Setting:
    """What all contenders are asked to do."""

    task: str
    image_size: int
    window_size: int
    precision: str

    def __str__(self) -> str:
        return f"{self.task} {self.image_size}/{self.window_size} {self.precision}"


SETTINGS = {
    str(setting): setting
    for setting in (
        *(Setting("classify", 256, window, precision) for window in (8, 16) for precision in ("fp32", "bf16")),
        *(Setting("simmim", 192, 12, precision) for precision in ("fp32", "bf16")),
    )
}
#: A model, and the loss of images with labels (or hidden units).
Contender = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


# Contenders


def ours(setting: Setting, backend: str) -> Contender:
    fields = {"image_size": setting.image_size, "window_size": setting.window_size, "drop_path_rate": 0.0}
    attention = {"backend": backend}
    if setting.task == "classify":
        model = create_model("swinv2_tiny", num_classes=1000, attention=attention, **fields)
        return model, partial(_cross_entropy, model)
    words = [f"model.{key}={value}" for key, value in fields.items()] + [f"model.attention.backend={backend}"]
    words += ["data.train=none", "data.pixel_type=float32", "task.target_norm_window=0"]
    config = load_config(Path(__file__).parents[1] / "configs/stages/tiny/simmim_192w12.yaml", words).config
    simmim = SimMIM(config)
    initialise(simmim, 0)
    return simmim, lambda images, hidden: simmim(images, hidden)[0].mean()


def timm_model(setting: Setting) -> Contender:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(img_size=setting.image_size, window_size=setting.window_size, drop_path_rate=0.0, **SHAPE)
    return model, partial(_cross_entropy, model)


def hugging_face(setting: Setting) -> Contender:
    from transformers import Swinv2Config, Swinv2ForImageClassification, Swinv2ForMaskedImageModeling

    sizes = {"image_size": setting.image_size, "window_size": setting.window_size}
    config = Swinv2Config(**sizes, **SHAPE, drop_path_rate=0.0, num_labels=1000, encoder_stride=32)
    if setting.task == "classify":
        model = Swinv2ForImageClassification(config)
        return model, lambda images, labels: F.cross_entropy(model(images).logits.float(), labels)
    masked = Swinv2ForMaskedImageModeling(config)

    def loss(images: Tensor, hidden: Tensor) -> Tensor:
        return masked(images, bool_masked_pos=_of_patches(hidden).flatten(1)).loss

    return masked, loss


def torchvision_model(setting: Setting) -> Contender:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    shape = {key: value if isinstance(value, int) else list(value) for key, value in SHAPE.items()}
    model = SwinTransformer(
        patch_size=[4, 4],
        window_size=[setting.window_size] * 2,
        stochastic_depth_prob=0.0,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
        **shape,
    )
    return model, partial(_cross_entropy, model)


def microsoft(setting: Setting, checkout: str) -> Contender:
    """Their files as they are."""
    package = sys.modules.setdefault("microsoft", types.ModuleType("microsoft"))
    package.__path__ = [f"{checkout}/models"]
    from importlib import import_module

    build = import_module("microsoft.swin_transformer_v2").SwinTransformerV2
    sizes = {"img_size": setting.image_size, "window_size": setting.window_size, "drop_path_rate": 0.0}
    if setting.task == "classify":
        model = build(**sizes, **SHAPE)
        return model, partial(_cross_entropy, model)
    theirs = import_module("microsoft.simmim")
    encoder = theirs.SwinTransformerV2ForSimMIM(**sizes, **SHAPE, num_classes=0)
    norm = types.SimpleNamespace(ENABLE=False, PATCH_SIZE=47)
    config = types.SimpleNamespace(NORM_TARGET=norm)
    masked = theirs.SimMIM(config=config, encoder=encoder, encoder_stride=32, in_chans=3, patch_size=4)
    return masked, lambda images, hidden: masked(images, _of_patches(hidden))


def contenders(setting: Setting, arguments: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    """By name; ours last."""
    found: dict[str, Callable[[], Contender]] = {"Hugging Face": partial(hugging_face, setting)}
    if setting.task == "classify":
        found = {"timm": partial(timm_model, setting), **found, "torchvision": partial(torchvision_model, setting)}
    if arguments.microsoft:
        found["Microsoft"] = partial(microsoft, setting, arguments.microsoft)
    if arguments.compiled:
        found |= {f"{name}, compiled": build for name, build in found.items() if name in COMPILED}
    return found | {f"ours, {backend}": partial(ours, setting, backend) for backend in arguments.backends}


COMPILED = ("timm", "Hugging Face")


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images).float(), labels)


def _of_patches(hidden: Tensor) -> Tensor:
    """From units of 32 px to patches of 4."""
    return hidden.repeat_interleave(8, 1).repeat_interleave(8, 2).int()


# One setting


class Work:
    """A contender with its optimizer and inputs."""

    def __init__(self, setting: Setting, name: str, build: Callable[[], Contender], batch_size: int) -> None:
        torch.manual_seed(0)
        self.model, self.loss = build()
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=setting.precision == "bf16")
        self.images = torch.randn(batch_size, 3, setting.image_size, setting.image_size)
        self.target = torch.randint(1000, (batch_size,))
        if setting.task == "simmim":
            units = setting.image_size // 32
            order = torch.rand(batch_size, units**2).argsort(1)
            self.target = (order < -(-6 * units**2 // 10)).view(batch_size, units, units)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if name.endswith("compiled"):
            self.loss = torch.compile(self.loss)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.loss(self.images, self.target)

    def train(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> None:
        self.forward()


def measure_times(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of all contenders, in this process."""
    works = {
        name: Work(setting, name, build, arguments.batch_size) for name, build in contenders(setting, arguments).items()
    }
    train = in_turns({name: work.train for name, work in works.items()}, arguments.rounds)
    for work in works.values():
        work.model.eval()
    eager = {name: work.infer for name, work in works.items() if not name.endswith("compiled")}
    forward = in_turns(eager, arguments.rounds)
    return {
        kind: {name: vars(times) for name, times in found.items()}
        for kind, found in (("train", train), ("forward", forward))
    }


def measure_memory(setting: Setting, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of one contender, in this process."""
    work = Work(setting, name, contenders(setting, arguments)[name], arguments.batch_size)
    kept = saved_bytes(work.forward, work.model.parameters())
    work.train()  # what stays is allocated now
    return {"kept": kept, "peak": peak_over_base(work.train)}


# The report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--backends", nargs="*", default=["eager", "sdpa", "fused"])
    parser.add_argument("--microsoft", metavar="CHECKOUT")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        _, setting, *contender = arguments.case
        measured = measure_memory(SETTINGS[setting], *contender, arguments) if contender else None
        print(json.dumps(measured or measure_times(SETTINGS[setting], arguments)))
        return
    results = {name: _measured(name, arguments) for name in arguments.settings}
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    with arguments.output.with_suffix(".md").open("w") as page, contextlib.redirect_stdout(page):
        _print_page(results, arguments)
    _plot(results, arguments.output.with_suffix(".png"))


def _measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A setting's times, and each contender's memory, by processes of their own."""
    print(name, file=sys.stderr, flush=True)
    options = ["--backends", *arguments.backends, "--batch-size", str(arguments.batch_size)]
    options += ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    options += ["--microsoft", arguments.microsoft] if arguments.microsoft else []
    options += ["--compiled"] if arguments.compiled else []
    found = apart(__file__, ["times", name], options)
    found["memory"] = {one: apart(__file__, ["memory", name, one], options) for one in found["forward"]}
    return found


def _seconds(found: dict[str, Any], kind: str) -> dict[str, Times]:
    return {name: Times(**times) for name, times in found[kind].items()}


def _best(times: dict[str, Times], clock: str) -> float:
    """The fastest eager peer's."""
    peers = [one for name, one in times.items() if not name.startswith("ours") and "compiled" not in name]
    return min(one.summary[clock] for one in peers)


def _print_page(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    print_header("SwinV2-T beside its peers", PACKAGES)
    print(f"- batches of {arguments.batch_size}, medians of {arguments.rounds} rounds")
    columns = ("contender", "train step, s", "ratio", "CPU s", "ratio", "forward, s", "kept, MiB", "peak, MiB")
    for name, found in results.items():
        print(f"\n## {name}")
        train, forward = _seconds(found, "train"), _seconds(found, "forward")
        rows = []
        for contender, times in train.items():
            cells = [contender]
            for clock in ("wall", "cpu"):
                cells += [f"{times.summary[clock]:.3f}", f"x{_best(train, clock) / times.summary[clock]:.2f}"]
            cells.append(f"{forward[contender].summary['wall']:.3f}" if contender in forward else "-")
            memory = found["memory"].get(contender)
            cells += [f"{memory[key] / MIB:.0f}" if memory else "-" for key in ("kept", "peak")]
            rows.append(cells)
        print_table(columns, rows)


def _plot(results: dict[str, Any], path: Path) -> None:
    """Images a second of every contender, a panel a setting."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 4), squeeze=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        train = _seconds(found, "train")
        rates = [_best(train, "cpu") / times.summary["cpu"] for times in train.values()]
        colours = ["tab:blue" if contender.startswith("ours") else "tab:gray" for contender in train]
        axis.bar(list(train), rates, color=colours)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.tick_params(axis="x", rotation=75, labelsize=8)
    axes[0][0].set_ylabel("train steps a CPU second\n(best eager peer = 1)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
