"""``swinv2-scale models|convert|export|predict``: what models there are, and anyone's weights in and out."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.config.loader import nearest_model_field
from swinv2_scale.config.model import VARIANTS, ModelConfig
from swinv2_scale.config.source import Settings, apply_overrides
from swinv2_scale.errors import ConfigError, printable
from swinv2_scale.plan.cost import num_multiply_adds, num_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from swinv2_scale.weights.read import Weights

#: (image in px, window in tokens) that each variant is published with, SimMIM's 192 px first: the released
#: configurations of T to L, the model hub, and appendix A2 of Swin V2 (arXiv 2111.09883). Ours are T at 192 px, which
#: configs/stages has, and G's windows of 12 and 40 for classification: the other models' at 192, its own on ADE20K.
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

    convert = commands.add_parser("convert", help="weights from anyone's format into another")
    convert.add_argument("source", type=Path, help="a .pth, .safetensors or .bin file, or a folder of Hugging Face's")
    _add_destination(convert, "--to")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="a run's or a checkpoint's weights, written by any number of processes")
    export.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    _add_destination(export, "--format")
    add_average(export)
    export.set_defaults(run=export_run)

    predict = commands.add_parser("predict", help="classify images: the likeliest classes, and a picture")
    predict.add_argument("weights", type=Path, help="a model with a class head: any format, a run, or a checkpoint")
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="jpg, png or webp, or a folder of them")
    predict.add_argument("--top-k", type=positive_int, default=5, metavar="K")
    predict.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line, if the weights lack them"
    )
    predict.add_argument(
        "--picture", type=Path, default=Path("predictions.png"), metavar="PNG", help="where it is drawn (replaced)"
    )
    predict.add_argument("--json", action="store_true", help="for scripts")
    add_average(predict)
    _add_fields(predict)
    predict.set_defaults(run=_predict)


def add_average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")


def _add_destination(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument("destination", type=Path, help="a folder for hf, else a .safetensors or .pth file")
    # The names are those of swinv2_scale.weights.names.FORMATS; importing it would import torch.
    parser.add_argument(
        option, dest="style", required=True, choices=("hf", "timm", "microsoft", "torchvision", "native")
    )
    _add_fields(parser)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    words = "of the model, after the files: image_size=256 window_size=8, for another size or where weights don't say"
    parser.add_argument("--set", dest="fields", nargs="+", action="extend", default=[], metavar="key=value", help=words)


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


def _convert(arguments: argparse.Namespace) -> None:
    _write(open_any(arguments.source), arguments)


def export_run(arguments: argparse.Namespace) -> None:
    from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
    from swinv2_scale.engine.start import consolidated

    found = open_run_or_checkpoint(arguments.source)
    _write(consolidated(found, "ema" if arguments.ema else "master"), arguments)


def _write(weights: Weights, arguments: argparse.Namespace) -> None:
    from swinv2_scale.weights.api import describe
    from swinv2_scale.weights.names import FORMAT_NAMES
    from swinv2_scale.weights.write import write_weights

    fields = model_fields(arguments.fields)
    print(printable(f"{weights.where}: {FORMAT_NAMES[weights.style]}'s format, {describe(weights.model_fields)}"))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing", total=len(weights.metas))
        read: set[str] = set()

        def watched(name: str) -> Tensor:
            read.add(name)
            progress.update(task, completed=len(read))
            return weights.tensor(name)

        left_out = write_weights(replace(weights, tensor=watched), arguments.destination, arguments.style, **fields)
    for sentence in left_out:
        print(printable(f"note: {sentence}"))
    target = arguments.destination
    files = [target] if target.is_file() else list(target.iterdir())
    num_bytes = sum(file.stat().st_size for file in files)
    print(f"{target}: {FORMAT_NAMES[arguments.style]}'s format, {len(read)} tensors, {num_bytes / 2**20:.1f} MiB")


def _predict(arguments: argparse.Namespace) -> None:
    from swinv2_scale.tasks.prediction import Classifier, draw_predictions, find_images

    paths = find_images(arguments.images)
    weights = open_any(arguments.weights, "ema" if arguments.ema else "master")
    classifier = Classifier(weights, arguments.labels, **model_fields(arguments.fields))
    found = []
    for path in paths:
        prediction = classifier.predict(path, arguments.top_k)
        found.append(prediction)
        if not arguments.json:
            print(printable(str(prediction.path)))
            for name, probability in prediction.top:
                print(printable(f"  {probability:6.1%}  {name}"))
    if arguments.json:
        print(json.dumps([{"image": str(p.path), "top": p.top} for p in found], indent=2))
    draw_predictions(found, arguments.picture)
    if not arguments.json:
        print(f"picture: {arguments.picture}")


def open_any(path: Path, kind: str = "master") -> Weights:
    """Weights of any format, and of runs and checkpoints: their masters, or their average (``ema``)."""
    from swinv2_scale.engine.run_dir import is_run_or_checkpoint

    if is_run_or_checkpoint(path):
        from swinv2_scale.engine.start import open_source  # takes DeepSpeed's seconds to import

        return open_source(path, kind)
    if kind != "master":
        raise ConfigError(f"{path} is no run and no checkpoint: it holds one set of weights", "leave out --ema")
    from swinv2_scale.weights.read import open_weights

    return open_weights(path)


def model_fields(words: list[str]) -> dict[str, Any]:
    """``image_size=256 window_size=8`` as fields of ModelConfig."""
    settings = Settings()
    apply_overrides(settings, words)
    fields = settings.tree()
    for key in fields:
        if key not in ModelConfig.model_fields:
            near = nearest_model_field(key)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"a model has no field {key!r}{hint}", f"one of: {', '.join(ModelConfig.model_fields)}")
    return fields
