"""``swinv2-scale models``: every variant with its size and its work, without importing torch."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.plan.cost import num_multiply_adds, num_parameters

#: (image in px, window in tokens) that each variant is published with, SimMIM's 192 px first: the released
#: configurations of T to L, the model hub, and appendix A2 of Swin V2 (arXiv 2111.09883). Ours are T at 192 px, which
#: configs/simmim has, and G's windows of 12 and 40 for classification: the other models' at 192, its own on ADE20K.
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny": ((192, 12), (256, 8), (256, 16)),
    "small": ((192, 12), (256, 8), (256, 16)),
    "base": ((192, 12), (256, 8), (256, 16), (384, 24)),
    "large": ((192, 12), (256, 16), (384, 24)),
    "huge": ((192, 12),),
    "1b": ((192, 12),),
    "giant": ((192, 12), (640, 40), (1536, 32)),
}
NUM_CLASSES = 1000
NOTES = """\
Parameters include a head of 1000 classes. FLOPs are multiply-adds of one image in billions, as papers count them.
swinv2_1b is what Microsoft's model hub calls "giant" or "g" (1.06 billion parameters). The paper's SwinV2-G, of 3.0 \
billion, is swinv2_giant.
The heads of huge, 1b and giant, and the width of 1b, were never published; these are ours, 32 channels a head."""


def add_commands(commands: Any) -> None:
    models = commands.add_parser("models", help="every model: name, shape, parameters, FLOPs")
    models.add_argument("--json", action="store_true", help="exact numbers, for scripts")
    models.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> None:
    rows = [_row(variant, *size) for variant in VARIANTS for size in SIZES[variant]]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # 80 columns
    for header in ("name", "width", "depths", "heads", "params, M", "image", "window", "FLOPs, G"):
        table.add_column(header, justify="left" if header in ("name", "depths", "heads") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["embed_dim"]),
            ",".join(map(str, row["depths"])),
            ",".join(map(str, row["num_heads"])),
            f"{row['parameters'] / 1e6:.1f}",
            str(row["image_size"]),
            str(row["window_size"]),
            f"{row['multiply_adds'] / 1e9:.1f}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(table)
    console.print("\n" + NOTES, highlight=False, markup=False)


def _row(variant: str, image_size: int, window_size: int) -> dict[str, Any]:
    model = ModelConfig.model_validate(
        {"variant": variant, "image_size": image_size, "window_size": window_size, "num_classes": NUM_CLASSES}
    )
    return {
        "name": f"swinv2_{variant}",
        "embed_dim": model.embed_dim,
        "depths": model.depths,
        "num_heads": model.num_heads,
        "num_classes": NUM_CLASSES,
        "parameters": num_parameters(model),
        "image_size": image_size,
        "window_size": window_size,
        "multiply_adds": num_multiply_adds(model),
    }
