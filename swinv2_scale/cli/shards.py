"""``swinv2-scale shards write``: data sets into shards. The other actions are in shards_check.py."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swinv2_scale.cli import shards_check
from swinv2_scale.cli.arguments import positive_int
from swinv2_scale.cli.progress import progress_bar
from swinv2_scale.errors import ConfigError, ExitCode, printable

if TYPE_CHECKING:
    from swinv2_scale.data.sources.write_job import WriteOptions

_LAYOUTS = """\
layouts, as their owners publish them (SRC is the folder they were unpacked to, or the one above it):
  imagefolder  CLASS/**/IMAGE, classes numbered by name as torchvision does; or just images, without labels
  imagenet     train/nXXXXXXXX/*.JPEG, val/ flat with ILSVRC2012_devkit_t12/ or in folders; Kaggle's ILSVRC/Data/;
               ImageNet-22K
  imagenet-v2  imagenetv2-*-format-val/ with folders 0 to 999, which are the labels; the classes are ImageNet-1K's
  coco         {train,val}2017/ and annotations/instances_{train,val}2017.json
  ade20k       ADEChallengeData2016/{images,annotations}/{training,validation}/
  kinetics     {train,val}/**/ID_START_END.mp4 and annotations/{train,val}.csv, as the CVDF distributes them
  csv          SRC is a CSV file with the columns path and, if there are labels, label (a number or a name)
"""
_SHORT_SIDE = """\
make larger images smaller, to JPEGs with this short side, upright; masks with them. Photographs of 500 px so decode
about twice as fast, and lose a little sharpness: benchmarks/results/data_*.md has speed and differences by size and
quality. Crops smaller than the model's image are enlarged. Without this, files keep their bytes"""
_SIZES = {
    "": 1,
    "B": 1,
    **{
        f"{p}{'i' if base == 1024 else ''}B": base**n
        for base, letters in ((1000, "KMGT"), (1024, "KMGT"))
        for n, p in enumerate(letters, start=1)
    },
}


def add_commands(commands: Any) -> None:
    shards = commands.add_parser("shards", help="write, index, verify, look at and unpack WebDataset shards")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    write = actions.add_parser(
        "write",
        help="images, masks or clips, with their labels, into shards",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_LAYOUTS,
    )
    _add_write_arguments(write)
    write.set_defaults(run=_write)
    shards_check.add_actions(actions)


def _add_write_arguments(write: argparse.ArgumentParser) -> None:
    add = write.add_argument
    add("source", type=Path, metavar="SRC")
    add("destination", type=Path, metavar="DST", help="a folder that isn't there yet")
    # The names are those of swinv2_scale.data.sources.choice; importing it would import numpy.
    layouts = ("imagefolder", "imagenet", "imagenet-v2", "coco", "ade20k", "kinetics", "csv")
    add(
        "--from", dest="layout", choices=layouts, default="imagefolder", help="the layout of SRC (default: %(default)s)"
    )
    add("--split", choices=("train", "validation"), help="of imagenet, coco, ade20k, kinetics (default: train)")
    add("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="at most (default: %(default)s)")
    words = "at most, like 256MiB or 1GB, unless one sample has more (default: 1GiB)"
    add("--bytes-per-shard", type=_size, default=2**30, metavar="SIZE", help=words)
    words = "that read, decode and re-encode; the bytes don't depend on it (default: one a core)"
    add("--processes", type=positive_int, default=len(os.sched_getaffinity(0)), metavar="N", help=words)
    add("--short-side", type=positive_int, metavar="PX", help=_SHORT_SIDE)
    add("--quality", type=_quality, metavar="Q", help="of the JPEGs of --short-side, 1 to 95 (default: 92)")
    order = write.add_mutually_exclusive_group()
    words = "keep the source's order; by class, that makes shards of few classes each"
    order.add_argument("--no-shuffle", action="store_true", help=words)
    order.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of writing (default: %(default)s)"
    )
    words = "leave damaged samples out and list them in DST/rejected.jsonl; else the first one ends the command"
    add("--skip-damaged", action="store_true", help=words)
    add("--no-verify", action="store_true", help="don't decode what is written to see that it is whole")
    words = "go on with what an interrupted command left in DST.part; the result is the same to the byte"
    add("--resume", action="store_true", help=words)


def _write(arguments: argparse.Namespace) -> None:
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _write_shards(arguments)
    except KeyboardInterrupt:
        part = Path(f"{arguments.destination}.part")
        finished = f"what is finished lies in {part}, go on with --resume" if part.exists() else "nothing was written"
        print(f"stopped; {finished}", file=sys.stderr)
        sys.exit(int(ExitCode.STOPPED))
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_shards(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.sources.choice import list_source
    from swinv2_scale.data.sources.write_job import REJECTED_NAME, write_source

    options = _write_options(arguments)
    source = list_source(arguments.layout, arguments.source, options.made_by["split"])
    for sentence in source.notes:
        print(printable(f"note: {sentence}"))
    destination = arguments.destination
    with progress_bar("writing", rate_of="samples") as show:
        summary = write_source(
            source,
            destination,
            options,
            processes=arguments.processes,
            skip_damaged=arguments.skip_damaged,
            resume=arguments.resume,
            on_progress=lambda done: show(done, len(source.items)),
        )
    print(f"{summary.samples} samples in {summary.shards} shards, {summary.bytes / 2**20:.1f} MiB, in {destination}")
    if summary.left_out:
        print(f"{summary.left_out} damaged samples were left out: {destination / REJECTED_NAME}")
    print(f"use data.train={destination}/*.tar")


def _write_options(arguments: argparse.Namespace) -> WriteOptions:
    from importlib.metadata import version

    from swinv2_scale.data.sources.choice import split_of
    from swinv2_scale.data.sources.preparation import Treatment
    from swinv2_scale.data.sources.write_job import WriteOptions

    if arguments.quality is not None and arguments.short_side is None:
        raise ConfigError("--quality is for what --short-side re-encodes; without it files keep their bytes")
    made_by = {
        "command": "swinv2-scale shards write",
        "version": version("swinv2-scale"),
        "layout": arguments.layout,
        "split": split_of(arguments.layout, arguments.split),
        "source": arguments.source.resolve().name,
    }
    if arguments.short_side is not None:
        made_by["pillow"] = version("pillow")  # others may encode otherwise
    return WriteOptions(
        made_by,
        arguments.samples_per_shard,
        arguments.bytes_per_shard,
        Treatment(not arguments.no_verify, arguments.short_side, arguments.quality or Treatment.quality),
        None if arguments.no_shuffle else arguments.seed,
    )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in _SIZES or float(match[1]) * _SIZES[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 256MiB, 1GB or 500000000")
    return int(float(match[1]) * _SIZES[match[2]])


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 95:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 95")
    return value
