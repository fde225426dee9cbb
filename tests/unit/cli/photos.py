"""A small source of real JPEGs, and the command that writes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from swinv2_scale.cli.main import main

NUM_IMAGES = 30
#: Makes eight shards of them.
SHARD = ("--samples-per-shard", "4")


def make_photos(folder: Path) -> Path:
    """Three classes of ten JPEGs, and a note."""
    noise = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / f"class {number % 3}" / f"{number:02d}.v1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (24 + number, 40, 3), np.uint8)).save(path)
    (folder / "readme.txt").write_text("hello")
    return folder


def write(*arguments: object) -> int:
    return main(["shards", "write", *map(str, arguments)])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
