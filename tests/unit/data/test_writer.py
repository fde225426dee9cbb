"""Tars by samples and bytes: bounds that hold, bytes that webdataset's own writer makes, keys that it reads."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.data.shards.manifest import read_manifest
from swinv2_scale.data.shards.writer import RawSample, ShardTars, tar_block, write_shards
from swinv2_scale.data.workers import in_order
from swinv2_scale.errors import DataError


def sample(number: int, size: int) -> RawSample:
    return {"__key__": f"s{number:04d}", "bin": bytes([number % 256]) * size, "cls": str(number).encode()}


def read_by_webdataset(folder: Path) -> list[dict[str, str | bytes]]:
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    read = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    return [
        {name: value for name, value in item.items() if not name.startswith("__") or name == "__key__"} for item in read
    ]


@pytest.mark.parametrize("key", ["plain", "a folder/ein Käfer", "長い/" + "x" * 300, "bytes/\udce9"])
def test_a_tar_has_the_bytes_that_webdatasets_writer_gives_it(tmp_path: Path, key: str) -> None:
    samples: list[RawSample] = [{"__key__": key, "jpg": b"x" * 700, "cls": b"3", "seg.png": b"p" * 512}]
    samples.append({"__key__": f"{key}2", "jpg": b"", "json": b"{}"})
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
        for one in samples:
            tar.write(one)
    write_shards(samples, tmp_path / "s", samples_per_shard=10, made_by="a test")
    assert (tmp_path / "s" / "000000.tar").read_bytes() == stream.getvalue()
    assert read_by_webdataset(tmp_path / "s") == samples


@settings(max_examples=40, deadline=None)  # each writes and syncs a folder
@given(
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=25),
    samples_per_shard=st.integers(1, 8),
    bytes_per_shard=st.none() | st.integers(1, 80_000),
)
def test_no_shard_is_above_its_bounds_and_none_ends_before_it_must(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], samples_per_shard: int, bytes_per_shard: int | None
) -> None:
    folder = tmp_path_factory.mktemp("bounds") / "s"
    samples = [sample(number, size) for number, size in enumerate(sizes)]
    bounds = {"samples_per_shard": samples_per_shard, "bytes_per_shard": bytes_per_shard}
    assert write_shards(samples, folder, made_by="a test", **bounds) == len(sizes)
    manifest = read_manifest(str(folder))
    assert manifest.schema["members"] == {"bin": len(sizes), "cls": len(sizes)}
    entries = list(manifest.entries.values())
    assert [(folder / entry.name).stat().st_size for entry in entries] == [entry.bytes for entry in entries]
    done = 0
    for entry in entries:
        done += entry.samples
        assert entry.samples <= samples_per_shard
        assert bytes_per_shard is None or entry.bytes <= bytes_per_shard or entry.samples == 1
        if done < len(samples) and entry.samples < samples_per_shard:
            # The next sample would not have fitted, by tarfile's own arithmetic.
            fuller = samples[done - entry.samples : done + 1]
            assert bytes_per_shard is not None
            assert tar_size(fuller) > bytes_per_shard
    assert read_by_webdataset(folder) == samples


def tar_size(samples: list[RawSample]) -> int:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for one in samples:
            for extension in ("bin", "cls"):
                info = tarfile.TarInfo(f"{one['__key__']}.{extension}")
                info.size = len(one[extension])
                tar.addfile(info, io.BytesIO(bytes(one[extension])))  # type: ignore[arg-type]
    return len(stream.getvalue())


def test_the_manifest_holds_the_schema_and_how_it_was_made(tmp_path: Path) -> None:
    schema = {"classes": ["cat", "dog"]}
    samples = [sample(0, 5), {"__key__": "b", "bin": b"1"}]
    write_shards(samples, tmp_path / "s", samples_per_shard=2, made_by={"command": "a test"}, schema=schema)
    data = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert data["made_by"] == {"command": "a test"}
    assert data["schema"]["classes"] == ["cat", "dog"]
    assert data["schema"]["members"] == {"bin": 2, "cls": 1}


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([{"__key__": "a", "_hidden": b"1"}], "no files"),
        ([{"__key__": "a", "cls": b"1"}, {"__key__": "a", "cls": b"2"}], "twice|already|again"),
        ([{"__key__": "a.x", "cls": b"1"}, {"__key__": "a.y", "cls": b"2"}], "1 of the 2 samples"),
        ([{"__key__": "__meta__/a", "cls": b"1"}], "0 of the 1 samples"),
    ],
    ids=["no files", "same key", "dots", "meta"],
)
def test_samples_that_webdataset_would_not_give_back_as_they_are_are_refused(
    tmp_path: Path, samples: list[RawSample], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        write_shards(samples, tmp_path / "s", samples_per_shard=10, made_by="a test")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_shard_is_handed_out_when_the_next_one_begins(tmp_path: Path) -> None:
    tars = ShardTars(tmp_path, samples_per_shard=2)
    blocks = [tar_block(sample(number, 10)) for number in range(3)]
    assert [tars.add(block) and tars.entries[-1].name for block in blocks] == [None, None, "000000.tar"]
    last = tars.finish()
    assert last is not None
    assert (last.name, last.samples) == ("000001.tar", 1)
    assert tars.finish() is None


# --- work in processes ------------------------------------------------------------------------------------------------


def square(number: int) -> int:
    if number == 13:
        raise DataError("thirteen")
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order_and_an_error_comes_in_its_place(processes: int) -> None:
    results = in_order(square, range(100), processes)
    assert [next(results) for _ in range(13)] == [number * number for number in range(13)]
    with pytest.raises(DataError, match="thirteen"):
        next(results)


@pytest.mark.parametrize(("processes", "most"), [(1, 1), (2, 8), (3, 12)])
def test_only_a_bounded_number_of_things_is_taken_ahead(processes: int, most: int) -> None:
    taken: list[int] = []

    def things() -> Iterator[int]:
        for number in range(100, 200):
            taken.append(number)
            yield number

    results = in_order(square, things(), processes)
    next(results)
    assert len(taken) <= most
    results.close()
    assert len(taken) <= most


def test_a_worker_that_is_killed_is_a_data_error() -> None:
    with pytest.raises(DataError, match="worker process was killed"):
        list(in_order(die, range(4), 2))
