"""``swinv2-scale shards write|index``: make shards, or a manifest for shards made by others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import track


def add_commands(commands: Any) -> None:
    shards = commands.add_parser("shards", help="write WebDataset shards, or index existing ones")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    write = actions.add_parser("write", help="a folder of images (CLASS/IMAGE, or just images) into shards")
    write.add_argument("source", type=Path)
    write.add_argument("destination", type=Path)
    write.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    write.set_defaults(run=_write)
    index = actions.add_parser("index", help="make the manifest of a folder of tars (img2dataset's, webdataset's, ..)")
    index.add_argument("folder", type=Path)
    index.set_defaults(run=_index)


def _write(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.sources import image_folder
    from swinv2_scale.data.writer import write_shards

    samples = track(image_folder(arguments.source), description="writing")
    count = write_shards(
        samples,
        arguments.destination,
        samples_per_shard=arguments.samples_per_shard,
        made_by=f"swinv2-scale shards write {arguments.source}",
    )
    print(f"{count} samples in {arguments.destination}; use data.train={arguments.destination}/*.tar")


def _index(arguments: argparse.Namespace) -> None:
    from swinv2_scale.data.manifest import expand_pattern, index_shard, write_manifest

    paths = expand_pattern(str(arguments.folder / "*.tar"))
    entries = [index_shard(path) for path in track(paths, description="indexing")]
    write_manifest(arguments.folder, entries, made_by="swinv2-scale shards index")
    print(
        f"{sum(e.samples for e in entries)} samples in {len(entries)} shards; use data.train={arguments.folder}/*.tar"
    )
