"""From bytes to pixels of eight bits: what is decoded, and what is refused."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_scale.data.images.decode import IMAGE_FORMATS, PixelFormat, decode_class, decode_image, open_image
from swinv2_scale.data.shards.reader import Record, ShardReader
from swinv2_scale.data.shards.shard_set import read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.errors import SampleError
from tests.support.pictures import decoded, encoded, npy, opened, smooth

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


# --- what is decoded --------------------------------------------------------------------------------------------------


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert np.array_equal(decoded("png", encoded(Image.fromarray(pixels), "PNG")), pixels)
    assert np.array_equal(decoded("webp", encoded(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)
    assert np.array_equal(decoded("png", encoded(Image.fromarray(pixels[..., 0]), "PNG"), 1), pixels[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_grey_and_colour_come_with_as_many_channels_as_asked(extension: str, mode: str, channels: int) -> None:
    image = smooth(mode)
    found = decoded(extension, encoded(image, FORMATS[extension]), channels).astype(int)
    assert found.shape == ((16, 24) if channels == 1 else (16, 24, 3))
    wanted = np.asarray(image).astype(float)
    if mode == "RGB" and channels == 1:
        wanted = wanted @ [0.299, 0.587, 0.114]  # ITU-R 601-2 luma
    if mode == "L" and channels == 3:
        wanted = np.repeat(wanted[..., None], 3, -1)
    # JPEG and WEBP at their default quality lose a few levels of a smooth image, more at subsampled colours.
    assert abs(found - wanted).mean() < (1 if extension == "png" else 4)


def test_jpeg_is_known_by_both_of_its_names() -> None:
    data = encoded(smooth(), "JPEG")
    assert np.array_equal(decoded("jpeg", data), decoded("jpg", data))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_alpha_is_dropped_and_the_colours_below_it_stay(mode: str, channels: int) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, len(mode) - 1), dtype=np.uint8)
    alpha = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    image = Image.fromarray(np.concatenate((colour, alpha), -1))
    assert image.mode == mode
    assert np.array_equal(decoded("png", encoded(image, "PNG"), channels), colour.squeeze())


def test_palettes_become_the_colours_that_they_stand_for() -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 1), 1)
    found = decoded("png", encoded(image, "PNG"))
    assert found[1, 2].tolist() == [200, 100, 50]
    assert found[0, 0].tolist() == [10, 20, 30]


def test_the_image_is_found_among_other_files() -> None:
    files = {"cls": b"7", "json": b"{}", "png": encoded(smooth(), "PNG"), "txt": b"a caption"}
    assert decode_image(Record("a", "a", files)).size == (24, 16)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "header only", "half", "html", "zeros"],
)
def test_what_is_no_whole_image_is_a_data_error_that_names_the_sample(extension: str, spoil: object) -> None:
    data = encoded(smooth(), FORMATS[extension])
    with pytest.raises(SampleError, match=rf"000000\.tar/a: {extension} doesn't decode"):
        decoded(extension, spoil(data))  # type: ignore[operator]


@pytest.mark.parametrize("extension", FORMATS)
def test_damage_is_a_data_error_or_other_pixels_and_nothing_else(extension: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), FORMATS[extension])
    variants = [data[:length] for length in range(0, len(data), 3)]
    for place in range(0, len(data), 2):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 7
        variants.append(bytes(flipped))
    num_refused = 0
    for variant in variants:
        try:
            found = decoded(extension, variant)
        except SampleError:
            num_refused += 1
        else:
            assert found.ndim == 3
            assert found.shape[2] == 3
    assert num_refused > len(data) // 4


@pytest.mark.parametrize(("extension", "content"), [(e, c) for e, c in itertools.product(FORMATS, FORMATS) if e != c])
def test_an_extension_may_hold_its_own_format_only(extension: str, content: str) -> None:
    with pytest.raises(SampleError, match=rf"000000\.tar/a: {extension} doesn't decode"):
        decoded(extension, encoded(smooth(), FORMATS[content]))


@pytest.mark.parametrize("fmt", ["PPM", "EPS", "ICO"])
def test_formats_outside_the_list_are_refused_under_any_name(fmt: str) -> None:
    data = encoded(smooth(), fmt)
    for extension in IMAGE_FORMATS:
        with pytest.raises(SampleError, match="doesn't decode"):
            decoded(extension, data)
    with pytest.raises(SampleError, match="has no image"):
        decoded(fmt.lower(), data)


def test_a_sample_without_an_image_says_what_it_holds() -> None:
    with pytest.raises(SampleError, match=r"t\.tar/a has no image: it holds cls, txt"):
        open_image(Record("a", "t.tar/a", {"cls": b"1", "txt": b""}), PixelFormat(3))
    with pytest.raises(SampleError, match="it holds nothing"):
        open_image(Record("a", "t.tar/a", {}), PixelFormat(3))


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is an HTML page, not JPEG"),
        (b"<HTML><body>", "it is an HTML page, not JPEG"),
        (b"\x89PNG\r\n\x1a\n", "it is PNG, not JPEG"),
        (b"%PDF-1.7", "it is a PDF, not JPEG"),
        (b"hello, world", "it doesn't start as JPEG does"),
        (encoded(smooth(), "JPEG")[:-60], "truncated"),
    ],
)
def test_the_cause_is_said_in_words(data: bytes, cause: str, decoder: str) -> None:
    with pytest.raises(SampleError, match=cause):
        decoded("jpg", data, decoder=decoder)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _size_field(fmt: str, side: int) -> bytes:
    """Width and height as they stand in a header."""
    if fmt == "WEBP":
        return ((side - 1) | (side - 1) << 14).to_bytes(4, "little")
    if fmt == "TIFF":
        return struct.pack("<HII", 4, 1, side)  # one 32-bit number, in both tags
    return struct.pack({"JPEG": ">HH", "BMP": "<ii", "GIF": "<HH"}[fmt], side, side)


def bomb(fmt: str, side: int) -> bytes:
    """A small file of the format whose header promises side x side pixels."""
    if fmt == "PNG":
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        idat = chunk(b"IDAT", zlib.compress(bytes(10**5)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")
    if fmt == "NPY":
        data = npy(np.zeros((11, 11), np.uint8))
        return data.replace(b"(11, 11)", f"({side}, {side})".encode())
    options: dict[str, object] = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(Image.new("L", (77, 77)), fmt, **options)
    old, new = (_size_field(fmt, length) for length in (77, side))
    assert old in data
    return data.replace(old, new)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize(
    ("extension", "side"),
    [
        ("png", 10_000),
        ("png", 30_000),
        ("png", 2**31 - 1),
        ("jpg", 10_000),
        ("jpg", 30_000),
        ("jpg", 65_500),
        ("bmp", 10_000),
        ("bmp", 100_000),
        ("gif", 10_000),
        ("gif", 65_000),
        ("webp", 10_000),
        ("webp", 16_000),
        ("tif", 10_000),
        ("tif", 10**6),
        ("npy", 10_000),
        ("npy", 10**9),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(extension: str, side: int, decoder: str) -> None:
    data = bomb(IMAGE_FORMATS[extension], side)
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match=r"pixels"):
            opened(extension, data, decoder=decoder)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10**7  # the smallest promises 10^8 bytes


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "gif", "tif", "npy"])
def test_the_limit_is_the_configurations(extension: str, decoder: str) -> None:
    data = npy(np.zeros((16, 24), np.uint8)) if extension == "npy" else encoded(smooth(), IMAGE_FORMATS[extension])
    assert opened(extension, data, max_pixels=24 * 16, decoder=decoder).width == 24
    with pytest.raises(SampleError, match=r"24x16 = 384 pixels, data\.max_image_pixels is 383"):
        opened(extension, data, max_pixels=24 * 16 - 1, decoder=decoder)


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.canary,)


def test_pickles_in_shards_stay_bytes(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bait = pickle.dumps(Bait(str(canary)))
    pickle.loads(bait)  # noqa: S301  the bait works
    canary.rmdir()
    names = ("pyd", "pickle", "pkl", "pth", "jpg")
    samples = [
        {"__key__": "a", **dict.fromkeys(names, bait)},
        {"__key__": "b", "png": encoded(smooth(), "PNG"), "pyd": bait},
    ]
    write_shards(samples, tmp_path / "s", samples_per_shard=2, made_by="a test")
    reader = ShardReader(read_shard_set(str(tmp_path / "s" / "*.tar")))
    first, second = reader.read(0, 0), reader.read(0, 1)
    reader.close()
    assert first.files == dict.fromkeys(names, bait)
    with pytest.raises(SampleError, match="jpg doesn't decode"):
        open_image(first, PixelFormat(3))
    with pytest.raises(SampleError, match="npy doesn't decode"):
        open_image(Record("c", "c", {"npy": bait}), PixelFormat(3))
    objects = npy(np.array([[Bait(str(canary))]], dtype=object), allow_pickle=True)
    with pytest.raises(SampleError, match="its values are object"):
        open_image(Record("d", "d", {"npy": objects}), PixelFormat(3))
    decode_image(second)
    assert not canary.exists()


# --- what others do wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_cmyk_jpegs_have_the_colours_that_pillow_shows(decoder: str) -> None:
    data = encoded(smooth().convert("CMYK"), "JPEG", quality=95)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded("jpg", data, decoder=decoder), wanted)
    # A gradient that has gone through CMYK at quality 95; inverted or misread inks are off by a hundred.
    assert abs(wanted.astype(int) - np.asarray(smooth())).mean() < 6


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(extension: str, decoder: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if extension == "webp" else {}
    data = encoded(frames[0], IMAGE_FORMATS[extension], save_all=True, append_images=frames[1:], **options)
    assert decoded(extension, data, decoder=decoder)[3, 3].tolist() == [200, 0, 0]


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_one_pixel_is_an_image(extension: str, decoder: str) -> None:
    data = encoded(Image.new("RGB", (1, 1), (90, 90, 90)), IMAGE_FORMATS[extension])
    pixels = opened(extension, data, decoder=decoder).resized((0, 0, 1, 1), (4, 6), "bicubic")
    assert pixels.shape == (3, 4, 6)
    assert abs(pixels.astype(int) - 90).max() <= 2  # JPEG and WEBP round


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "num_classes", "wanted"),
    [
        ({"cls": b"7"}, 10, 7),
        ({"cls": b" 0\n"}, 1, 0),
        ({"cls": b"123456"}, None, 123456),
        ({"json": b'{"label": 3, "text": "a cat"}'}, 4, 3),
        ({"cls": b"1", "json": b'{"label": 3}'}, 4, 1),
    ],
)
def test_a_label_is_read_from_cls_or_json(files: dict[str, bytes], num_classes: int | None, wanted: int) -> None:
    assert decode_class(Record("a", "t.tar/a", files), num_classes) == wanted


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"jpg": b""}, "has no label: it holds jpg"),
        ({"cls": b""}, "the label in cls is '', not an integer"),
        ({"cls": b"cat"}, "the label in cls is 'cat', not an integer"),
        ({"cls": b"1.0"}, "not an integer"),
        ({"cls": b"9" * 5000}, "not an integer"),
        ({"cls": b"\xff\xfe"}, "not an integer"),
        ({"cls": "\u0661".encode()}, "not an integer"),
        ({"cls": b"10"}, "the label in cls is 10, classes are 0 to 9"),
        ({"cls": b"-1"}, "the label in cls is -1, classes are 0 to 9"),
        ({"json": b"{"}, "the label in json is '{', not an integer"),
        ({"json": b"[1]"}, "not an integer"),
        ({"json": b'{"label": true}'}, "not an integer"),
        ({"json": b'{"label": 1.5}'}, "not an integer"),
        ({"json": b'{"label": "1"}'}, "not an integer"),
        ({"json": b"{}"}, "not an integer"),
        ({"json": b"[" * 100_000}, "not an integer"),
        ({"json": b'{"label": 10}'}, "the label in json is 10"),
    ],
)
def test_a_label_that_is_none_is_refused_by_name(files: dict[str, bytes], cause: str) -> None:
    with pytest.raises(SampleError, match=r"sample t\.tar/a") as found:
        decode_class(Record("a", "t.tar/a", files), 10)
    assert cause in str(found.value)


def test_without_a_number_of_classes_a_label_is_still_not_negative() -> None:
    with pytest.raises(SampleError, match="no class is negative"):
        decode_class(Record("a", "t.tar/a", {"cls": b"-3"}), None)
