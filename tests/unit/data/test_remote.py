"""Remote shards over HTTP: read from a real server on this machine, through failures, by several processes."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinv2_scale.data.remote.files import is_remote, local_path
from swinv2_scale.errors import DataError, SampleError
from tests.support.http_store import Fault, HttpStore
from tests.support.remote_shard import (
    BLOCK,
    CONTENT,
    IDENTITY,
    PASSING,
    SIZE,
    files,
    in_child,
    patience,
    read_all,
    served_shard,
)

pytest.importorskip("aiohttp", reason="extra remote")

KEY = "AKIA-SECRET"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStore]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served_shard(tmp_path) as running:
        yield running


# --- ranges, blocks and the cache -------------------------------------------------------------------------------------


def test_any_range_is_the_files_own_and_each_block_is_asked_for_once(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    numbers = random.Random(0)
    ranges = [(0, 1), (SIZE - 1, 1), (BLOCK - 1, 2), (0, SIZE), (5, 0), (SIZE, 0)]
    ranges += [(start, numbers.randrange(SIZE - start)) for start in (numbers.randrange(SIZE) for _ in range(50))]
    for offset, length in ranges:
        found = remote.read(f"{store.url}/s.tar", IDENTITY, SIZE, offset, length)
        assert found == CONTENT[offset : offset + length], (offset, length)
    wanted = {f"bytes={start}-{min(start + BLOCK, SIZE) - 1}": 1 for start in range(0, SIZE, BLOCK)}
    assert store.asked() == wanted
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT  # as another process of the node, or the next run
    assert len(store.requests) == 4


def test_only_the_blocks_of_a_range_are_asked_for(store: HttpStore, tmp_path: Path) -> None:
    files(tmp_path).read(f"{store.url}/s.tar", IDENTITY, SIZE, 25_000, 100)
    assert store.asked() == {"bytes=20000-29999": 1}


def test_the_same_content_at_another_address_comes_from_the_cache(store: HttpStore, tmp_path: Path) -> None:
    read_all(files(tmp_path), f"{store.url}/s.tar")
    assert read_all(files(tmp_path), "s3://nowhere/renamed.tar") == CONTENT


def test_a_cache_of_one_block_still_reads_everything(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path, cache_bytes=2 * 4096 + 3 * 4096)
    for _ in range(2):
        assert read_all(remote, f"{store.url}/s.tar") == CONTENT
    assert len(store.requests) > 4


def test_bit_rot_in_the_cache_is_fetched_again(store: HttpStore, tmp_path: Path) -> None:
    read_all(files(tmp_path), f"{store.url}/s.tar")
    block = tmp_path / "cache" / f"{IDENTITY}.00000001.block"
    data = bytearray(block.read_bytes())
    data[77] ^= 1
    block.write_bytes(data)
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT
    assert store.asked()["bytes=10000-19999"] == 2
    assert len(store.requests) == 5


def test_forgotten_bytes_are_asked_for_again(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    read_all(remote, f"{store.url}/s.tar")
    remote.forget(IDENTITY, 9_999, 2)
    assert read_all(remote, f"{store.url}/s.tar") == CONTENT
    assert sorted(store.asked().values()) == [1, 1, 2, 2]


def test_sizes_are_told_and_a_missing_file_has_none(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    assert remote.size(f"{store.url}/s.tar") == SIZE
    assert remote.size(f"{store.url}/empty") == 0
    assert remote.size(f"{store.url}/missing.tar") is None
    store.fail(Fault(no_ranges=True))
    assert remote.size(f"{store.url}/s.tar") == SIZE
    assert store.bytes_sent < 2 * SIZE  # one byte, and at most what was under way before the connection was closed


def test_a_server_that_tells_no_size_is_refused(store: HttpStore, tmp_path: Path) -> None:
    store.fail(Fault(no_length=True))
    with pytest.raises(DataError, match=r"s\.tar: the store doesn't say how many bytes it has"):
        files(tmp_path).size(f"{store.url}/s.tar")


def test_small_files_are_read_whole_and_larger_ones_refused(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    assert remote.read_whole(f"{store.url}/s.tar", SIZE) == CONTENT
    assert remote.read_whole(f"{store.url}/empty", 10) == b""
    with pytest.raises(DataError, match=rf"s\.tar has more than {SIZE - 1} bytes"):
        remote.read_whole(f"{store.url}/s.tar", SIZE - 1)
    with pytest.raises(DataError, match=r"/missing: not found"):
        remote.read_whole(f"{store.url}/missing", 10)
    assert not (tmp_path / "cache").exists()


def test_a_stream_is_the_whole_file_and_survives_failures_in_the_middle(store: HttpStore, tmp_path: Path) -> None:
    store.fail(Fault(), Fault(), Fault(cut_after=500), Fault(status=503), Fault())
    assert b"".join(files(tmp_path).stream(f"{store.url}/s.tar")) == CONTENT
    assert not (tmp_path / "cache").exists()


def test_http_folders_cannot_be_listed(store: HttpStore, tmp_path: Path) -> None:
    assert files(tmp_path).list_names(store.url) is None
    assert store.requests == []


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_asked_again_and_logged(
    store: HttpStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    retries = 2 if fault.silent_after is None else 1
    store.fail(*[fault] * retries)
    with caplog.at_level(logging.WARNING, "swinv2_scale"):
        remote = files(tmp_path, timeout_s=patience(fault), retries=retries)
        found = remote.read(f"{store.url}/s.tar?key={KEY}", IDENTITY, SIZE, 100, 500)
    assert found == CONTENT[100:600]
    assert len(store.requests) == retries + 1
    assert [message.startswith(f"{store.url}/s.tar: ") for message in caplog.messages] == [True] * retries
    assert re.search(rf"asked again in \S+ s \(try {retries + 1} of {retries + 1}\)", caplog.messages[-1])
    assert KEY not in caplog.text


def test_a_connection_that_is_reset_is_made_again(store: HttpStore, tmp_path: Path) -> None:
    store.fail(*[Fault(reset=True)] * 4)  # aiohttp makes each connection twice
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT
    assert store.asked()["bytes=0-9999"] == 5
    store.fail_always(Fault(reset=True))
    with pytest.raises(DataError, match=r"reset by peer.*\(asked 3 times\)"):
        files(tmp_path).size(f"{store.url}/s.tar")


def test_a_content_length_that_is_too_large_harms_nothing(store: HttpStore, tmp_path: Path) -> None:
    store.fail(Fault(length=1000))
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(silent_after=10), Fault(cut_after=10), Fault(shift=1)])
def test_after_the_last_try_the_error_names_address_tries_and_cause(
    store: HttpStore, tmp_path: Path, fault: Fault
) -> None:
    store.fail_always(fault)
    with pytest.raises(DataError, match=rf"^{store.url}/s\.tar: \S.*\(asked 3 times\)") as caught:
        read_all(files(tmp_path, timeout_s=patience(fault)), f"{store.url}/s.tar?key={KEY}")
    assert not isinstance(caught.value, SampleError)  # a store that is away damages no sample
    assert "data.remote.retries" in caught.value.next_step
    assert KEY not in str(caught.value)
    assert len(store.requests) == 3
    store.fail_always(None)
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT  # nothing of the failures was kept


def test_nobody_listening_is_asked_again_too(store: HttpStore, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/s.tar"
        with pytest.raises(DataError, match=r"Connect call failed.*\(asked 3 times\)"):
            read_all(files(tmp_path), address)


@pytest.mark.parametrize(("status", "advice"), [(401, "credentials"), (403, "credentials"), (404, "data.train")])
def test_what_cannot_pass_is_not_asked_again(store: HttpStore, tmp_path: Path, status: int, advice: str) -> None:
    store.fail_always(Fault(status=status))
    with pytest.raises(DataError, match=rf"^{store.url}/s\.tar: .*{status}") as caught:
        read_all(files(tmp_path), f"{store.url}/s.tar?key={KEY}")
    assert advice in caught.value.next_step
    assert KEY not in str(caught.value)
    assert len(store.requests) == 1


def test_a_server_that_ignores_ranges_is_refused_before_it_has_sent_the_file(tmp_path: Path, store: HttpStore) -> None:
    size = 64 * 2**20
    with (tmp_path / "served" / "large.tar").open("wb") as file:
        file.truncate(size)
    store.fail_always(Fault(no_ranges=True))
    with pytest.raises(DataError, match=r"large\.tar: the server ignores Range"):
        files(tmp_path).read(f"{store.url}/large.tar", IDENTITY, size, 0, 10)
    assert len(store.requests) == 1
    assert store.bytes_sent == 0  # counted after a body went out whole


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, SIZE + 20_000])
def test_a_file_of_another_size_than_its_manifests_is_refused(store: HttpStore, tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match=f"has {SIZE} bytes, not the expected {size}"):
        files(tmp_path).read(f"{store.url}/s.tar", IDENTITY, size, size - 10, 10)
    assert len(store.requests) == 1


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_of_a_node_fetch_each_block_once(store: HttpStore, tmp_path: Path) -> None:
    def read() -> None:
        remote, numbers = files(tmp_path), random.Random(os.getpid())
        for start in numbers.sample(range(0, SIZE - 500, 500), 60):
            assert remote.read(f"{store.url}/s.tar", IDENTITY, SIZE, start, 500) == CONTENT[start : start + 500]

    for process in [in_child(read) for _ in range(6)]:
        process.join()
        assert process.exitcode == 0
    assert sorted(store.asked().values()) == [1, 1, 1, 1]


def test_a_process_killed_in_a_download_leaves_the_block_to_the_next(store: HttpStore, tmp_path: Path) -> None:
    store.fail(Fault(silent_after=4_000))
    process = in_child(lambda: print(read_all(files(tmp_path, timeout_s=60), f"{store.url}/s.tar")))
    while not store.bytes_sent:
        process.join(0.01)
        assert process.is_alive()
    process.kill()
    assert read_all(files(tmp_path), f"{store.url}/s.tar") == CONTENT
    assert store.asked()["bytes=0-9999"] == 2
    process.join()


def test_a_forked_child_reads_with_connections_of_its_own(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    location = f"{store.url}/s.tar"
    assert remote.read(location, IDENTITY, SIZE, 0, 10) == CONTENT[:10]

    def read() -> None:
        assert remote.read(location, IDENTITY, SIZE, 0, 15_000) == CONTENT[:15_000]
        assert remote.size(location) == SIZE

    children = [in_child(read) for _ in range(2)]
    assert remote.read(location, IDENTITY, SIZE, 20_000, 10) == CONTENT[20_000:20_010]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert read_all(remote, location) == CONTENT


def test_a_pickled_reader_reads(store: HttpStore, tmp_path: Path) -> None:
    remote = files(tmp_path)
    read_all(remote, f"{store.url}/s.tar")
    copy = pickle.loads(pickle.dumps(remote))  # noqa: S301
    assert copy.size(f"{store.url}/s.tar") == SIZE


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "remote", "path"),
    [
        ("/data/s.tar", False, "/data/s.tar"),
        ("data/pipe:s.tar", False, "data/pipe:s.tar"),
        ("file:///data/a%20b.tar", False, "/data/a%20b.tar"),
        ("file:data/s.tar", False, "data/s.tar"),
        ("http://h/s.tar", True, "http://h/s.tar"),
        ("pipe:cat s.tar", True, "pipe:cat s.tar"),
        ("ftp://h/s.tar", True, "ftp://h/s.tar"),
    ],
)
def test_addresses_are_told_from_paths(location: str, remote: bool, path: str) -> None:
    assert is_remote(location) == remote
    assert local_path(location) == path
