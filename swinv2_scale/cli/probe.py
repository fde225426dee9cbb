"""``swinv2-scale probe``: what the frozen features of a run, of SimMIM too, know about the classes of images."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.cli.models import add_average, model_fields, open_any
from swinv2_scale.cli.progress import progress_bar
from swinv2_scale.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from swinv2_scale.tasks.features import FrozenModel
    from swinv2_scale.tasks.probing import Features


def add_commands(commands: Any) -> None:
    probe = commands.add_parser("probe", help="k-NN and a linear classifier on frozen features, of any weights")
    add = probe.add_argument
    add("weights", type=Path, metavar="RUN_OR_FILE", help="a run, a checkpoint, or weights of any format")
    words = "labelled ones, as data.train takes them; they are what neighbours are and the classifier is fitted to"
    add("--train", required=True, metavar="SHARDS", help=words)
    add("--validation", required=True, metavar="SHARDS", help="labelled ones to be told right, each counted once")
    add("--method", choices=("knn", "linear", "both"), default="both")
    add("-k", type=positive_int, default=20, help="nearest neighbours that vote (default: %(default)s, as DINO's)")
    add("--temperature", type=_positive, default=0.07, help="of the votes' weights (default: %(default)s)")
    words = "of the linear classifier's weights, L2 (default: what does best on a tenth of the training samples)"
    add("--penalty", type=_positive, help=words)
    add("--crop-pct", type=_positive, metavar="SHARE", help="of an image, in the middle (default: the weights', 0.875)")
    add("--crop-mode", choices=("center", "squash"), help="squash: all of it, its shape changed")
    add("--shards-dir", type=Path, default=Path("shards"), metavar="DIR", help="where embedded:NAME is written")
    words = "that decode images (default: one a core)"
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help=words)
    add("--json", action="store_true", help="for scripts")
    words = "of the model: image_size=256 window_size=16, for another size or where weights don't say"
    add("--set", dest="fields", nargs="+", action="extend", default=[], metavar="key=value", help=words)
    add_average(probe)
    probe.set_defaults(run=_probe)


def _probe(arguments: argparse.Namespace) -> None:
    from swinv2_scale.config.tasks import CropRule
    from swinv2_scale.tasks.features import FrozenModel

    fields = model_fields(arguments.fields)
    weights = open_any(arguments.weights, "ema" if arguments.ema else "master")
    known = weights.facts.crop or CropRule()
    share, mode = arguments.crop_pct or known.crop_pct, arguments.crop_mode or known.crop_mode
    if share > 1:
        raise ConfigError(f"--crop-pct {share} is a share of the image, at most 1")
    model = FrozenModel(weights, CropRule(share, mode, known.interpolation), **fields)
    found = []
    for use in ("train", "validation"):
        with progress_bar(f"features of --{use}", rate_of="images") as show:
            pattern = getattr(arguments, use)
            found.append(model.features(pattern, arguments.shards_dir, max(arguments.workers, 0), show))
    train, validation = found
    num_classes = int(train.labels.max()) + 1
    if int(validation.labels.max()) >= num_classes:
        raise DataError(
            f"--validation has labels up to {int(validation.labels.max())}, --train up to {num_classes - 1}",
            "give both from one data set: what was never seen can't be told",
        )
    report = _facts(arguments, model, weights.where, train, validation)
    if arguments.method in ("knn", "both"):
        report["knn"] = _knn(arguments, train, validation, num_classes)
    if arguments.method in ("linear", "both"):
        report["linear"] = _linear(arguments, train, validation, num_classes)
    print(json.dumps(report, indent=1)) if arguments.json else _print(report)


def _facts(
    arguments: argparse.Namespace, model: FrozenModel, where: str, train: Features, validation: Features
) -> dict[str, Any]:
    return {
        "weights": where,
        "average": arguments.ema,
        "image_size": model.config.image_size,
        "window_size": model.config.window_size,
        "crop": model.crop._asdict(),
        "features": train.values.shape[1],
        "train": {"shards": arguments.train, "samples": len(train)},
        "validation": {"shards": arguments.validation, "samples": len(validation)},
        "classes": int(train.labels.max()) + 1,
    }


def _knn(arguments: argparse.Namespace, train: Features, validation: Features, num_classes: int) -> dict[str, Any]:
    from swinv2_scale.tasks.probing import accuracies, knn_scores

    if arguments.k > len(train):
        raise ConfigError(f"-k is {arguments.k}, --train has {len(train)} samples", f"choose at most {len(train)}")
    scores = knn_scores(train, validation.values, num_classes, arguments.k, arguments.temperature)
    return {"k": arguments.k, "temperature": arguments.temperature, **accuracies(scores, validation.labels)}


def _linear(arguments: argparse.Namespace, train: Features, validation: Features, num_classes: int) -> dict[str, Any]:
    from swinv2_scale.tasks.probing import PENALTIES, accuracies, choose_penalty, fit_linear

    tried: dict[str, float] = {}
    penalty = arguments.penalty
    with progress_bar("fitting the linear classifier") as show:
        if penalty is None:

            def note(value: float, accuracy: float) -> None:
                tried[f"{value:g}"] = accuracy
                show(len(tried), len(PENALTIES) + 1)

            penalty = choose_penalty(train, num_classes, note)
        linear = fit_linear(train, num_classes, penalty)
    return {
        "penalty": penalty,
        "held_out_top1": tried,
        **accuracies(linear.scores(validation.values), validation.labels),
    }


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    train, validation = report["train"], report["validation"]
    crop = report["crop"]
    lines = [
        f"{report['weights']}{' (average)' if report['average'] else ''}",
        f"{report['features']} features at {report['image_size']} px, window {report['window_size']}, crop "
        f"{crop['crop_mode']} {crop['crop_pct']:g}; {report['classes']} classes",
        f"{train['samples']:,} samples of {train['shards']}, {validation['samples']:,} of {validation['shards']}",
        "",
        f"{'':<34}  top-1   top-5",
    ]
    if "knn" in report:
        knn = report["knn"]
        name = f"k-NN (k {knn['k']}, temperature {knn['temperature']:g})"
        lines.append(f"{name:<34}{knn['top1']:7.2%} {knn['top5']:7.2%}")
    if "linear" in report:
        linear = report["linear"]
        name = f"linear (penalty {linear['penalty']:g})"
        lines.append(f"{name:<34}{linear['top1']:7.2%} {linear['top5']:7.2%}")
    console.print("\n".join(map(printable, lines)), markup=False, soft_wrap=True)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
