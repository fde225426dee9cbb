"""The block cache: what it gives back, its bound, and what kills, bit rot and full disks do to it."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from swinv2_scale.data.remote import cache as cache_module
from swinv2_scale.data.remote.cache import BlockCache, block_name
from swinv2_scale.errors import ConfigError, DataError, OutputError

fork = multiprocessing.get_context("fork")
BLOCK = 100_000  # two pieces with a checksum each
ON_DISK = 102_400  # 100,000 + 2 * 4, rounded up to pages of 4,096
PAGE = 4096


def content(number: int, length: int = BLOCK) -> bytes:
    return random.Random(number).randbytes(length)


def name(number: int) -> str:
    return block_name(hashlib.sha256(str(number).encode()).hexdigest(), number)


def cache_of(folder: Path, num_blocks: int = 5, block_bytes: int = BLOCK) -> BlockCache:
    return BlockCache(folder, num_blocks * ON_DISK + PAGE, block_bytes)


def held(cache: BlockCache, count: int = 100) -> list[int]:
    """Numbers of the blocks that are here, with the right content."""
    found = [number for number in range(count) if cache.get(name(number), BLOCK, 0, BLOCK) is not None]
    assert all(cache.get(name(number), BLOCK, 0, BLOCK) == content(number) for number in found)
    return found


def bytes_on_disk(folder: Path) -> int:
    """What the files take, by the kernel's count and by their lengths, whichever is more."""
    total = 0
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        total += max(status.st_size, status.st_blocks * 512)
    return total


def started(target: Callable[[], None]) -> ForkProcess:
    process = fork.Process(target=target, daemon=True)
    process.start()
    return process


# --- what is put is got -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 65_535, 65_536, 65_537, BLOCK])
def test_any_range_of_a_block_is_given_back(tmp_path: Path, length: int) -> None:
    cache = cache_of(tmp_path)
    cache.put(name(0), content(0, length))
    numbers = random.Random(1)
    borders = [0, 1, 65_535, 65_536, 65_537, length] + [numbers.randrange(length + 1) for _ in range(20)]
    for start in borders:
        for stop in borders:
            if start < stop <= length:
                assert cache.get(name(0), length, start, stop) == content(0, length)[start:stop], (start, stop)


def test_what_was_not_put_is_not_there(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "never" / "made")
    assert cache.get(name(0), BLOCK, 0, 10) is None
    cache.drop(name(0))
    assert not (tmp_path / "never").exists()


def test_another_process_sees_what_was_put_and_not_what_was_dropped(tmp_path: Path) -> None:
    cache_of(tmp_path).put(name(0), content(0))
    other = cache_of(tmp_path)
    assert held(other) == [0]
    other.drop(name(0))
    assert held(cache_of(tmp_path)) == []


@pytest.mark.parametrize("place", [0, 65_535, 65_536, BLOCK - 1, BLOCK, BLOCK + 4, BLOCK + 7])
def test_a_flipped_bit_is_noticed_where_it_is_read_and_the_rest_still_serves(tmp_path: Path, place: int) -> None:
    cache = cache_of(tmp_path)
    cache.put(name(0), content(0))
    data = bytearray((tmp_path / name(0)).read_bytes())
    data[place] ^= 16
    (tmp_path / name(0)).write_bytes(data)
    first_piece_hit = place < 65_536 or BLOCK <= place < BLOCK + 4
    assert cache.get(name(0), BLOCK, 0, BLOCK) is None
    assert (cache.get(name(0), BLOCK, 5, 10) is None) == first_piece_hit
    assert (cache.get(name(0), BLOCK, 70_000, 70_001) is None) != first_piece_hit
    cache.put(name(0), content(0))
    assert held(cache) == [0]


@pytest.mark.parametrize("kept", [0, 1, 50_000, BLOCK - 1, BLOCK, BLOCK + 7])
def test_a_block_cut_short_is_not_given(tmp_path: Path, kept: int) -> None:
    cache = cache_of(tmp_path)
    cache.put(name(0), content(0))
    os.truncate(tmp_path / name(0), kept)
    assert cache.get(name(0), BLOCK, 0, BLOCK) is None
    assert cache.get(name(0), BLOCK, BLOCK - 9, BLOCK) is None


@pytest.mark.parametrize(
    "identity", ["", "..", "../" * 3 + "etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "/x", "a" * 64 + "\n", "0" * 200]
)
def test_an_identity_that_is_no_digest_never_becomes_a_path(identity: str) -> None:
    with pytest.raises(DataError, match="is not the SHA-256"):
        block_name(identity, 0)


def test_an_identity_may_have_a_suffix() -> None:
    assert block_name("0" * 64 + ".index", 3) == "0" * 64 + ".index.00000003.block"


# --- the bound --------------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, num_blocks=3)
    for number in range(3):
        cache.put(name(number), content(number))
    cache.get(name(0), BLOCK, 0, 1)
    cache.put(name(3), content(3))
    assert held(cache) == [0, 2, 3]
    cache.put(name(4), content(4))  # held() has used them in their order
    assert held(cache) == [2, 3, 4]


def test_putting_a_block_again_takes_no_more_room(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, num_blocks=3)
    for number in (0, 1, 2, 2, 2, 2, 1):
        cache.put(name(number), content(number))
    assert held(cache) == [0, 1, 2]


def test_a_bound_below_one_block_of_each_process_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"4 processes that read blocks of 100000 bytes need (\d+) at least"
    ) as caught:
        BlockCache(tmp_path, 200_000, BLOCK, num_readers=4)
    least = int(re.findall(r"need (\d+)", str(caught.value))[0])
    BlockCache(tmp_path, least, BLOCK, num_readers=4)
    with pytest.raises(ConfigError):
        BlockCache(tmp_path, least - 1, BLOCK, num_readers=4)


def test_the_folder_never_takes_more_than_the_bound_while_processes_contend(tmp_path: Path) -> None:
    def work() -> None:
        cache, numbers = cache_of(tmp_path), random.Random(os.getpid())
        for _ in range(40):
            number = numbers.randrange(20)
            with cache.fetching(name(number)):
                if cache.get(name(number), BLOCK, 0, BLOCK) not in (None, content(number)):
                    os._exit(3)
                cache.put(name(number), content(number))
        os._exit(0)

    processes = [started(work) for _ in range(4)]
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, bytes_on_disk(tmp_path))
        time.sleep(0.0005)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 3 * ON_DISK < most <= 5 * ON_DISK + PAGE
    assert len(held(cache_of(tmp_path))) >= 3


def test_a_wrong_count_of_bytes_is_put_right_by_the_next_process(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for number in range(5):
        cache.put(name(number), content(number))
    for count in (0, 10**15):
        (tmp_path / "space.lock").write_bytes(count.to_bytes(8, "little"))
        cache_of(tmp_path).put(name(4), content(4))
        assert held(cache) == [0, 1, 2, 3, 4]
        cache_of(tmp_path).put(name(7), content(7))
        assert bytes_on_disk(tmp_path) <= 5 * ON_DISK + PAGE
        cache.drop(name(7))
        cache.put(name(0), content(0))


def test_blocks_deleted_by_hand_are_simply_gone(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    for number in range(3):
        cache.put(name(number), content(number))
    for path in tmp_path.iterdir():
        path.unlink()
    cache.put(name(1), content(1))
    assert held(cache) == [1]


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_writer_killed_at_any_moment_leaves_whole_blocks_and_the_bound(tmp_path: Path) -> None:
    def write_for_ever() -> None:
        cache = cache_of(tmp_path)
        while True:
            number = random.SystemRandom().randrange(20)
            cache.put(name(number), content(number))

    numbers = random.Random(7)
    for _ in range(20):
        process = started(write_for_ever)
        time.sleep(0.01 + numbers.random() * 0.02)
        process.kill()
        process.join()
        assert {path.stat().st_size for path in tmp_path.glob("*.block")} <= {BLOCK + 8}
        held(cache_of(tmp_path))
        assert bytes_on_disk(tmp_path) <= 5 * ON_DISK + PAGE
    cache_of(tmp_path).put(name(50), content(50))  # the lock is free, and what the last one left is cleared away
    assert 50 in held(cache_of(tmp_path))
    assert not (tmp_path / "unfinished.part").exists()


def test_an_unfinished_file_of_a_killed_writer_is_cleared_away(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, num_blocks=2)
    cache.put(name(0), content(0))
    (tmp_path / "unfinished.part").write_bytes(bytes(BLOCK))
    other = cache_of(tmp_path, num_blocks=2)
    other.put(name(1), content(1))
    assert not (tmp_path / "unfinished.part").exists()
    assert held(other) == [0, 1]


def test_one_process_fetches_while_the_others_wait(tmp_path: Path) -> None:
    def fetch() -> None:
        cache = cache_of(tmp_path / "cache")
        with cache.fetching(name(0)):
            if cache.get(name(0), BLOCK, 0, BLOCK) is None:
                with (tmp_path / "fetched").open("a") as file:
                    file.write("x")
                time.sleep(0.05)
                cache.put(name(0), content(0))
        os._exit(0)

    for process in [started(fetch) for _ in range(8)]:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "fetched").read_text() == "x"


def test_a_killed_fetcher_lets_the_next_one_in(tmp_path: Path) -> None:
    entered = fork.Event()

    def hang() -> None:
        with cache_of(tmp_path).fetching(name(0)):
            entered.set()
            time.sleep(60)

    process = started(hang)
    assert entered.wait(20)
    process.kill()
    with cache_of(tmp_path).fetching(name(0)):  # hangs if the lock outlives its owner
        process.join()


# --- disks that are full or closed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk_blocks", [3, 1])
def test_on_a_full_disk_the_cache_shrinks_until_the_block_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_blocks: int
) -> None:
    cache = cache_of(tmp_path, num_blocks=10)
    for number in range(5):
        cache.put(name(number), content(number))
    limit_disk(monkeypatch, tmp_path, disk_blocks * ON_DISK + PAGE)
    cache.put(name(9), content(9))
    assert held(cache) == [0, 1, 2, 3, 4, 9][-disk_blocks:]
    assert bytes_on_disk(tmp_path) <= disk_blocks * ON_DISK + PAGE


def test_a_disk_without_room_for_one_block_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_disk(monkeypatch, tmp_path, ON_DISK)
    with pytest.raises(OutputError, match=r"can't be used: No space left on device") as caught:
        cache_of(tmp_path).put(name(0), content(0))
    assert "data.remote.cache_dir" in caught.value.next_step


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = cache_of(tmp_path / "file" / "cache")
    assert cache.get(name(0), BLOCK, 0, 1) is None
    with pytest.raises(OutputError, match="can't be used"):
        cache.put(name(0), content(0))
    with pytest.raises(OutputError, match="can't be used"), cache.fetching(name(0)):
        pass


def limit_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, disk_bytes: int) -> None:
    """Files in the folder are written until they fill a disk of this size; a real one needs root."""
    write = cache_module._write

    def write_if_it_fits(path: Path, data: bytes) -> None:
        if bytes_on_disk(folder) + len(data) > disk_bytes:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(cache_module, "_write", write_if_it_fits)
