"""Indexing anyone's tars in one pass, and counting exactly what a damaged one has lost."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from swinv2_scale.data.shards.indexing import ShardScan, is_part_of_a_sample, scan_shard
from swinv2_scale.data.shards.manifest import INDEX_ENTRY, MAX_SAMPLE_BYTES
from swinv2_scale.errors import DataError
from tests.support.index_shard import index_shard

Member = tuple[str, bytes]
KEYS = [f"s{i}" for i in range(10)]


class Pipe:
    """A stream that can only be read forward, and gives less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self._numbers = io.BytesIO(data), random.Random(0)

    def read(self, size: int) -> bytes:
        return self._data.read(min(size, self._numbers.randrange(1, 5000)))


def tar(members: list[Member], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members(keys: list[str] = KEYS, extensions: tuple[str, ...] = ("jpg", "cls")) -> list[Member]:
    """Files of one to three blocks, full of bytes that aren't zero."""
    numbers = random.Random(1)
    return [
        (f"{key}.{e}", bytes(numbers.choices(range(1, 256), k=numbers.randrange(1, 1500))))
        for key in keys
        for e in extensions
    ]


def starts(data: bytes) -> list[int]:
    """Where each member begins, its extended headers included."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [member.offset for member in file]


def scan(data: bytes) -> ShardScan:
    return scan_shard(Pipe(data), "x.tar", "x.tar", skip_damaged=True)


def indexed_keys(data: bytes) -> list[str]:
    """Keys of the samples that a scan calls whole, read back with tarfile by the index's ranges and checked."""
    keys = []
    for offset, length, checksum in INDEX_ENTRY.iter_unpack(scan(data).index):
        piece = data[offset : offset + length]
        assert len(piece) == length
        assert zlib.crc32(piece) == checksum
        with tarfile.open(fileobj=io.BytesIO(piece)) as file:
            names = file.getnames()
        found = {webdataset.tariterators.base_plus_ext(name)[0] for name in names}
        assert len(found) == 1
        keys += found
    return keys


def assert_counts(data: bytes, written: int, whole: list[str], left_out: list[str]) -> ShardScan:
    """What is whole is indexed, what isn't is listed, and together they are what was written."""
    found = scan(data)
    assert indexed_keys(data) == whole
    assert [left.key for left in found.left_out] == left_out
    assert found.entry.samples + sum(left.samples for left in found.left_out) == written
    with pytest.raises(DataError, match=r"^x\.tar .*byte \d+"):
        scan_shard(Pipe(data), "x.tar", "x.tar")
    return found


# --- whole tars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_stream_is_indexed_as_tarfile_reads_it(fmt: int) -> None:
    keys = [*KEYS, "d/" + "x" * 90] if fmt == tarfile.USTAR_FORMAT else [*KEYS, "x" * 150, "d" * 200 + "/é", "y" * 99]
    data = tar(members(keys), fmt)
    found = scan_shard(Pipe(data), "x.tar", "x.tar")
    assert found == scan(data)
    assert indexed_keys(data) == keys
    assert found.members == {"jpg": len(keys), "cls": len(keys)}
    assert (found.entry.bytes, found.left_out, found.is_cut) == (len(data), [], False)
    firsts = starts(data)[::2]
    assert [entry[0] for entry in INDEX_ENTRY.iter_unpack(found.index)] == firsts


def test_the_index_beside_a_file_is_that_of_its_stream(tmp_path: Path) -> None:
    data = tar(members())
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    found = scan(data)
    assert index_shard(path) == found.entry
    assert (tmp_path / "x.tar.index").read_bytes() == found.index


def test_contents_are_handed_out_sample_by_sample() -> None:
    seen: list[tuple[int, str, dict[str, bytes]]] = []
    data = tar(members())
    scan_shard(Pipe(data), "x.tar", "x.tar", on_sample=lambda *sample: seen.append(sample))
    wanted = dict(members())
    assert [key for _, key, _ in seen] == KEYS
    assert [start for start, _, _ in seen] == starts(data)[::2]
    assert all(files == {e: wanted[f"{key}.{e}"] for e in ("jpg", "cls")} for _, key, files in seen)


def test_members_that_webdataset_does_not_see_are_passed_over() -> None:
    names = ["README", "__notes__/a.txt", "__meta__", ".hidden.jpg", "a.jpg", "d.e/f", "a.b.c", "d/a.x", "__", "x__.y"]
    data = tar([(name, b"1") for name in names])
    read = webdataset.tariterators.tar_file_iterator(io.BytesIO(data))
    seen = [item["fname"] for item in read if webdataset.tariterators.base_plus_ext(item["fname"])[0]]
    assert [name for name in names if is_part_of_a_sample(name)] == seen
    assert scan(data).passed_over == len(names) - len(seen)
    assert not is_part_of_a_sample("d/._s.jpg")  # a Mac's; WebDataset makes a sample called "d/" of it


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_names_are_only_names(fmt: int) -> None:
    keys = ["../../etc/passwd", "/absolute/x", "n" * 100_000, "\udcff\udcfe", "new\nline", "..", "a/../b"]
    keys.remove("..")  # has no base name: no sample
    data = tar(members(keys), fmt)
    assert scan_shard(Pipe(data), "x.tar", "x.tar").entry.samples == len(keys)
    damaged = bytearray(data)
    damaged[starts(data)[6] + 2000 :] = b""
    assert all(len(left.key) < 200 and left.key.isprintable() for left in scan(bytes(damaged)).left_out)


def test_a_sample_of_more_bytes_than_a_reader_takes_is_refused_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar(members())
    ends = [*starts(data)[2::2], len(data)]
    lengths = [length for _, length, _ in INDEX_ENTRY.iter_unpack(scan(data).index)]
    limit = sorted(lengths)[5]
    monkeypatch.setattr("swinv2_scale.data.shards.indexing.MAX_SAMPLE_BYTES", limit)
    whole = [key for key, length in zip(KEYS, lengths, strict=True) if length <= limit]
    assert 0 < len(whole) < len(ends)
    found = assert_counts(data, len(KEYS), whole, [key for key in KEYS if key not in whole])
    assert {left.cause for left in found.left_out} == {
        f"the sample has more than {limit} bytes, the most that a reader takes"
    }
    handed: dict[str, dict[str, bytes]] = {}
    scan_shard(Pipe(data), "x", "x", skip_damaged=True, on_sample=lambda _, key, files: handed.update({key: files}))
    assert all(("cls" in handed[key]) == (key in whole) for key in KEYS)


def test_a_file_too_large_for_any_reader_is_refused_before_it_is_read() -> None:
    info = tarfile.TarInfo("a.bin")
    info.size = MAX_SAMPLE_BYTES  # and its header's 512 bytes
    with pytest.raises(DataError, match=r"at byte 0.*'a'.*more than 1073741824 bytes"):
        scan_shard(io.BytesIO(info.tobuf()), "x.tar", "x.tar")
    info.size -= 512
    with pytest.raises(DataError, match="cut"):
        scan_shard(io.BytesIO(info.tobuf()), "x.tar", "x.tar")


def test_a_header_for_all_members_inside_a_sample_is_part_of_its_bytes() -> None:
    one, two = (tar([(name, b"1")])[:1024] for name in ("a.jpg", "a.cls"))
    everywhere = tarfile.TarInfo.create_pax_global_header({"comment": "x"})
    assert indexed_keys(everywhere + one + everywhere + two + bytes(1024)) == ["a"]


def test_a_sample_with_an_end_mark_inside_is_not_whole() -> None:
    one, two, three = (tar([(name, b"1")]) for name in ("a.jpg", "a.cls", "b.jpg"))
    found = scan(one + two + three)
    assert [left.key for left in found.left_out if left.samples] == ["a"]
    assert indexed_keys(one + two + three) == ["b"]


def test_a_name_with_a_nul_is_read_as_tarfile_reads_it() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"path": "a\0b.jpg"}
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    seen: list[str] = []
    scan_shard(Pipe(data), "x.tar", "x.tar", on_sample=lambda start, key, files: seen.append(key))
    assert seen == ["a\0b"]
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        assert file.getnames() == ["a\0b.jpg"]


def test_memory_does_not_grow_with_the_tar_but_for_its_keys() -> None:
    class Endless:
        """A tar of 4,000 samples with long names that is never in memory."""

        def __init__(self) -> None:
            self._left, self._number = b"", 0

        def read(self, size: int) -> bytes:
            while len(self._left) < size and self._number < 4_000:
                info = tarfile.TarInfo(f"{'k' * 3000}{self._number}.jpg")
                info.size = 20_000
                self._left += info.tobuf(tarfile.GNU_FORMAT) + b"x" * 20_000 + bytes(480)
                self._number += 1
                if self._number == 4_000:
                    self._left += bytes(1024)
            piece, self._left = self._left[:size], self._left[size:]
            return piece

    tracemalloc.start()
    found = scan_shard(Endless(), "x.tar", "x.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.entry.samples == 4_000
    assert found.entry.bytes > 90e6
    assert peak < 4_000 * 300 + 4 * 2**20  # 300 bytes a sample and the pieces being read


# --- damaged tars: every sample is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_one_damaged_header_costs_its_sample_and_no_other(fmt: int) -> None:
    keys = KEYS if fmt == tarfile.USTAR_FORMAT else [key + "é" * 90 for key in KEYS]
    data = tar(members(keys), fmt)
    for number, start in enumerate(starts(data)):
        key = keys[number // 2]
        rest = [other for other in keys if other != key]
        for place in (0, 50, 100, 124, 130, 148, 156, 257):  # name, mode, size, checksum, type, magic
            damaged = bytearray(data)
            damaged[start + place] ^= 1
            assert_counts(bytes(damaged), 10, rest, [key])
        damaged = bytearray(data)
        damaged[start : start + 512] = bytes(512)
        found = assert_counts(bytes(damaged), 10, rest, [key])
        assert str(start) in found.left_out[0].cause


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_whose_long_name_is_lost_is_lost_with_it(fmt: int) -> None:
    keys = [f"{i}" + "n" * 150 for i in range(6)]
    data = tar(members(keys), fmt)
    for number, start in enumerate(starts(data)):
        rest = [key for key in keys if key != keys[number // 2]]
        for block in (0, 1, 2):  # the long name's header, the long name, the member's own header
            damaged = bytearray(data)
            damaged[start + 512 * block : start + 512 * (block + 1)] = bytes(512)
            assert indexed_keys(bytes(damaged)) == rest, (number, block)
            assert sum(left.samples for left in scan(bytes(damaged)).left_out) == 1, (number, block)


def test_a_lost_sample_of_one_file_is_counted_after_its_neighbour() -> None:
    data = tar(members(extensions=("jpg",)))
    for number, start in enumerate(starts(data)):
        for damage in (bytes(512), b"x" * 512):
            damaged = data[:start] + damage + data[start + 512 :]
            rest = [key for key in KEYS if key != KEYS[number]]
            assert_counts(damaged, 10, rest, [f"after {KEYS[number - 1] if number else ''}"])


def test_a_cut_is_found_wherever_it_is() -> None:
    data = tar(members())
    places = starts(data)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in range(0, end + 1, 128):
        found = scan(data[:cut])
        assert found.is_cut
        assert len(found.left_out) == 1
        assert ("end mark" in found.left_out[0].cause) == (cut in places or cut == end)
        with pytest.raises(DataError, match=rf"the tar is cut at byte {cut}"):
            scan_shard(Pipe(data[:cut]), "x.tar", "x.tar")
        if cut < places[2]:
            continue  # no other sample shows what the first one lacks
        begun = -(-sum(start < cut for start in places) // 2)
        whole = sum(stop <= cut for stop in [*places[2::2], end])
        assert indexed_keys(data[:cut]) == KEYS[:whole]
        assert whole + sum(left.samples for left in found.left_out) == begun, cut


def test_keys_that_come_twice_keep_the_first() -> None:
    again = members(["s3"])
    for place in (8, 14, 20):  # right behind the first, later, last
        mixed = members()
        mixed[place:place] = again
        assert_counts(tar(mixed), 11, KEYS, ["s3"])


def test_interleaved_samples_are_left_out_each_once() -> None:
    mixed = members()
    mixed[4:8] = [mixed[4], mixed[6], mixed[5], mixed[7]]  # s2.jpg s3.jpg s2.cls s3.cls
    found = assert_counts(tar(mixed), 10, [key for key in KEYS if key not in ("s2", "s3")], ["s2", "s3"])
    assert {left.cause for left in found.left_out} == {"its files don't follow each other"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("extension", ["jpg", "cls"])
def test_a_sample_with_a_link_or_device_is_left_out_by_its_key(kind: bytes, extension: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == f"s4.{extension}":
                info.type, info.size, info.linkname = kind, 0, "/etc/passwd"
            file.addfile(info, io.BytesIO(content))
    assert_counts(buffer.getvalue(), 10, [key for key in KEYS if key != "s4"], ["s4"])


def test_tars_joined_by_cat_lose_nothing() -> None:
    found = assert_counts(tar(members(KEYS[:4])) + tar(members(KEYS[4:])), 10, KEYS, [])
    assert not found.is_cut


def test_a_damaged_end_mark_costs_no_sample() -> None:
    data = tar(members())
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for place in (end, end + 100, end + 600, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 64
        assert_counts(bytes(damaged), 10, KEYS, [])


@pytest.mark.parametrize("damage", range(40))
def test_random_damage_never_ends_in_anything_but_a_count(damage: int) -> None:
    numbers = random.Random(damage)
    data = bytearray(tar(members(), numbers.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    for _ in range(numbers.randrange(1, 6)):
        place = numbers.randrange(len(data))
        length = numbers.choice([1, 4, 512, 700])
        change: Callable[[int], bytes] = numbers.choice([numbers.randbytes, bytes, lambda n: b""])
        data[place : place + length] = change(length)
    found = scan(bytes(data))
    for offset, length, checksum in INDEX_ENTRY.iter_unpack(found.index):
        assert zlib.crc32(data[offset : offset + length]) == checksum
        assert offset + length <= len(data)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(1000)])
def test_a_file_that_is_no_tar_has_no_samples(content: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar is cut or damaged at byte 0"):
        scan_shard(Pipe(content), "x.tar", "x.tar")
    assert scan(content).entry.samples == 0


def test_the_error_names_the_byte_the_sample_there_and_the_last_whole_one() -> None:
    data = tar(members())
    place = starts(data)[7]  # s3.cls
    damaged = data[:place] + bytes(512) + data[place + 512 :]
    with pytest.raises(DataError) as caught:
        scan_shard(Pipe(damaged), "store/x.tar", "x.tar")
    assert caught.value.message == (
        f"store/x.tar is cut or damaged at byte {place}, in or after sample 3 ('s3'); the last whole sample is 's2': "
        f"a block of zeros at byte {place}, where a header should be"
    )
