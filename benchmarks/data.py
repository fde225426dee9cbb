"""Images per second and core from shard to uint8 crop, against torchvision's ImageFolder and plain webdataset; and what
the fast decoder does to pixels:

    .venv/bin/python benchmarks/data.py --out benchmarks/results/data_decoding_HARDWARE_YYYYMM.md

Every pipeline reads the same JPEGs and makes SimMIM's crop: RandomResizedCrop to 192x192 of 0.67 to 1 of the area, and
a flip; none draws masks. One process, one thread, CPU time (`time.process_time`), so that other jobs on the machine
count little; the pipelines take turns, round by round, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from machine import describe_machine, describe_versions
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.datasets import ImageFolder

from swinv2_scale.data.images.decode import PixelFormat, open_image
from swinv2_scale.data.images.resize import mirrored
from swinv2_scale.data.images.transforms import random_resized_crop
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.draws import Draw

PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)
#: width, height, JPEG quality, and the noise (standard deviation in levels) that gives photographs' usual file sizes.
SETS = ((400, 300, 90, 4.0), (500, 375, 95, 3.0), (1600, 1200, 90, 4.0))
#: Short side and quality of the shards that are re-encoded before the training, as `shards write` can.
SMALL = ((256, 90), (224, 90), (224, 80), (192, 80))
SIZE, SCALE, RATIO = (192, 192), (0.67, 1.0), (3 / 4, 4 / 3)
PACKAGES = ("pillow", "simplejpeg", "opencv-python-headless", "torchvision", "webdataset")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCE = "ImageFolder, PIL bicubic, ToTensor, Normalize"
Pass = Callable[[int], int]  # one pass over the set, returning how many images; the argument is the round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; standard output without it")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    lines = [
        "# Decoding and cropping\n",
        f"- machine: {describe_machine()}",
        f"- versions: {describe_versions(*PACKAGES)}",
        f"- command: `python benchmarks/data.py --rounds {arguments.rounds}`; one thread, CPU time",
        f"- images: {len(PHOTOS)} photographs of scikit-image with noise (seed 0); every pipeline: RandomResizedCrop "
        "192 of 0.67 to 1 of the area, flip; no masks",
    ]
    for width, height, quality, noise in SETS:
        jpegs = make_jpegs(width, height, quality, noise)
        kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
        lines.append(f"\n## {width}x{height}, quality {quality}, {kilobytes:.0f} kB each\n")
        with tempfile.TemporaryDirectory() as folder:
            lines += speed_table(pipelines(jpegs, Path(folder)), arguments.rounds)
        print("\n".join(lines[-12:]), file=sys.stderr)
        lines += ["", *pixel_table(jpegs)]
    lines.append(f"\nAll of it took {time.monotonic() - started:.0f} s.")
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        sys.stdout.write(text)


def make_jpegs(width: int, height: int, quality: int, noise: float) -> list[bytes]:
    """The photographs, cropped to the shape and scaled, with noise as cameras add it."""
    rng = np.random.default_rng(0)
    folder = Path(str(resources.files("skimage.data")))
    found = []
    for name in PHOTOS:
        with Image.open(folder / name) as photo:
            pixels = np.asarray(ImageOps.fit(photo.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
        noisy = pixels + rng.normal(0, noise, pixels.shape)
        found.append(encoded(Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)), quality))
    return found


def encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def smaller(jpeg: bytes, short_side: int, quality: int) -> bytes:
    image = Image.open(io.BytesIO(jpeg))
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return encoded(image.resize(size, Image.Resampling.LANCZOS), quality)


def pipelines(jpegs: list[bytes], folder: Path) -> dict[str, Pass]:
    (folder / "images" / "class").mkdir(parents=True)
    for number, jpeg in enumerate(jpegs):
        (folder / "images" / "class" / f"{number:04d}.jpg").write_bytes(jpeg)
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    shards = write(jpegs, folder / "shards")
    image_folder = ImageFolder(str(folder / "images"), theirs)
    plain = webdataset.WebDataset(str(folder / "shards" / "000000.tar"), shardshuffle=False)
    decoded = plain.decode("pil").to_tuple("jpg").map_tuple(theirs)
    found = {
        REFERENCE: lambda _: sum(1 for index in range(len(image_folder)) if image_folder[index]),
        'webdataset `.decode("pil")`, the same': lambda _: sum(1 for _ in decoded),
        "ours, exact": lambda number: ours(shards, number, "exact"),
        "ours, fast": lambda number: ours(shards, number, "fast"),
    }
    for side, quality in SMALL:
        content = [smaller(jpeg, side, quality) for jpeg in jpegs]
        reader = write(content, folder / f"shards-{side}-{quality}")
        kilobytes = sum(map(len, content)) / len(content) / 1000
        name = f"ours, fast, short side {side}, quality {quality} ({kilobytes:.0f} kB)"
        found[name] = lambda number, reader=reader: ours(reader, number, "fast")  # type: ignore[misc]
    return found


def write(jpegs: list[bytes], folder: Path) -> ShardReader:
    samples: Iterator[dict[str, str | bytes]] = (
        {"__key__": f"{number:04d}", "jpg": jpeg} for number, jpeg in enumerate(jpegs)
    )
    write_shards(samples, folder, samples_per_shard=len(jpegs), made_by="benchmarks/data.py")
    return ShardReader(read_shard_set(str(folder / "*.tar")))


def ours(reader: ShardReader, number: int, decoder: str) -> int:
    wanted = PixelFormat(channels=3, decoder=decoder)
    count = reader.shards.entries[0].samples
    for index in range(count):
        record = reader.read(0, index)
        crop(record, Draw(0, number, record.id), wanted)
    return count


def crop(record: Record, draw: Draw, wanted: PixelFormat) -> Any:
    """SimMIM's training sample without its mask."""
    picture = open_image(record, wanted)
    pixels = random_resized_crop(picture, SIZE, SCALE, RATIO, "bicubic", draw.uniforms("crop"))
    return mirrored(pixels) if next(draw.uniforms("flip")) < 0.5 else pixels


def speed_table(passes: dict[str, Pass], rounds: int) -> list[str]:
    speeds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(-1, rounds):
        for name, one_pass in passes.items():
            start = time.process_time()
            count = one_pass(number)
            if number >= 0:  # the round before warms caches up
                speeds[name].append(count / (time.process_time() - start))
    reference = statistics.median(speeds[REFERENCE])
    lines = ["| pipeline | images/s/core | ratio | every round |", "|---|---|---|---|"]
    for name, values in speeds.items():
        median = statistics.median(values)
        raw = " ".join(f"{value:.0f}" for value in values)
        lines.append(f"| {name} | {median:.0f} | x{median / reference:.2f} | {raw} |")
    return lines


def pixel_table(jpegs: list[bytes]) -> list[str]:
    """Crops of the same boxes, each against exact bicubic."""
    others: dict[str, tuple[str, str, tuple[int, int] | None]] = {
        "ours, fast": ("fast", "bicubic", None),
        "Pillow's bilinear (exact), for scale": ("exact", "bilinear", None),
        **{f"ours, fast, short side {s}, quality {q}": ("fast", "bicubic", (s, q)) for s, q in SMALL},
    }
    lines = [
        "| against exact bicubic | mean difference | largest | PSNR, dB | energy kept above half Nyquist's frequency |",
        "|---|---|---|---|---|",
    ]
    for name, (decoder, interpolation, small) in others.items():
        mean, largest, squares, kept = [], [], [], []
        for (number, jpeg), seed in itertools.product(enumerate(jpegs), range(2)):
            exact = fixed_crop(jpeg, number + 1000 * seed, "exact", "bicubic", None)
            found = fixed_crop(jpeg, number + 1000 * seed, decoder, interpolation, small)
            mean.append(abs(found - exact).mean())
            largest.append(abs(found - exact).max())
            squares.append(((found - exact) ** 2).mean())
            kept.append(high_energy(found) / high_energy(exact))
        psnr = 10 * np.log10(255**2 / np.mean(squares))
        lines.append(
            f"| {name} | {np.mean(mean):.2f} | {max(largest):.0f} | {psnr:.1f} | {100 * statistics.median(kept):.0f}% |"
        )
    return lines


def fixed_crop(jpeg: bytes, seed: int, decoder: str, interpolation: str, small: tuple[int, int] | None) -> Any:
    """float (3, 192, 192) of a box that is the same share of the image whatever its size."""
    content = smaller(jpeg, *small) if small else jpeg
    picture = open_image(Record("a", "a", {"jpg": content}), PixelFormat(channels=3, decoder=decoder))
    rng = np.random.default_rng(seed)
    share = np.sqrt(rng.uniform(*SCALE))
    left, top = rng.random(2) * (1 - share)
    # Whole pixels, as crop_box draws them.
    box = [round(part * picture.width) for part in (left, left + share)]
    rows = [round(part * picture.height) for part in (top, top + share)]
    return picture.resized((box[0], rows[0], box[1], rows[1]), SIZE, interpolation).astype(float)


def high_energy(pixels: Any) -> float:
    """Of the grey image's spectrum, the part above half of Nyquist's frequency in either direction."""
    power = np.abs(np.fft.fft2(pixels.mean(0))) ** 2
    frequency = np.abs(np.fft.fftfreq(SIZE[0]))
    return float(power[(frequency[:, None] > 0.25) | (frequency[None] > 0.25)].sum())


if __name__ == "__main__":
    main()
