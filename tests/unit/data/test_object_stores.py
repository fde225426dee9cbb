"""Shards in s3 and gs: moto's S3 server, and ours where it has to fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinv2_scale.errors import DataError
from tests.support.http_store import Fault, HttpStore
from tests.support.remote_shard import (
    CONTENT,
    IDENTITY,
    PASSING,
    SIZE,
    files,
    patience,
    read_all,
    served_shard,
)

pytest.importorskip("aiohttp", reason="extra remote")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpStore]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served_shard(tmp_path) as running:
        yield running


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def bucket(aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's S3 server with a bucket that has two shards in a folder, and something below that."""
    pytest.importorskip("s3fs", reason="extra remote")
    session = pytest.importorskip("botocore.session").get_session()
    server_module = pytest.importorskip("moto.server", reason="extra dev")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    client = session.create_client("s3")
    client.create_bucket(Bucket="shards")
    for key in ("train/b.tar", "train/a.tar", "train/more/c.tar", "other.tar"):
        client.put_object(Bucket="shards", Key=key, Body=CONTENT)
    yield "s3://shards"
    server.stop()


def test_an_s3_bucket_is_read_measured_and_listed(bucket: str, tmp_path: Path) -> None:
    remote = files(tmp_path)
    assert remote.read(f"{bucket}/train/a.tar", IDENTITY, SIZE, 9_990, 12_345) == CONTENT[9_990 : 9_990 + 12_345]
    assert remote.size(f"{bucket}/train/a.tar") == SIZE
    assert remote.size(f"{bucket}/train/z.tar") is None
    assert remote.size(f"{bucket}/train") is None  # a folder is no file
    assert remote.list_names(f"{bucket}/train") == ["a.tar", "b.tar"]
    assert remote.list_names(bucket) == ["other.tar"]
    assert remote.read_whole(f"{bucket}/other.tar", SIZE) == CONTENT
    for question in (remote.list_names, lambda where: read_all(remote, where)):
        with pytest.raises(DataError, match="s3://nobodys/x"):
            question("s3://nobodys/x")


S3_PASSING = {key: PASSING[key] for key in ("status 503", "silent in the body", "cut in the body")}


@pytest.mark.parametrize("fault", S3_PASSING.values(), ids=S3_PASSING.keys())
def test_a_failing_s3_store_is_asked_again_as_often_as_configured(
    store: HttpStore, tmp_path: Path, aws: None, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    pytest.importorskip("s3fs", reason="extra remote")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    (tmp_path / "served" / "bucket").mkdir()
    (tmp_path / "served" / "bucket" / "s.tar").write_bytes(CONTENT)
    remote = files(tmp_path, timeout_s=patience(fault), retries=1)
    store.fail(fault)
    assert remote.read("s3://bucket/s.tar", IDENTITY, SIZE, 100, 500) == CONTENT[100:600]
    assert len(store.requests) == 2
    store.fail_always(fault)
    with pytest.raises(DataError, match=r"^s3://bucket/s\.tar: \S.*\(asked 2 times\)"):
        remote.read("s3://bucket/s.tar", IDENTITY, SIZE, 15_000, 1)
    assert len(store.requests) == 4


@pytest.mark.parametrize(("status", "advice"), [(403, "credentials"), (404, "data.train")])
def test_s3_refusals_are_not_asked_again(
    store: HttpStore, tmp_path: Path, aws: None, monkeypatch: pytest.MonkeyPatch, status: int, advice: str
) -> None:
    pytest.importorskip("s3fs", reason="extra remote")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    store.fail_always(Fault(status=status))
    with pytest.raises(DataError, match=r"^s3://bucket/s\.tar: ") as caught:
        read_all(files(tmp_path), "s3://bucket/s.tar")
    assert advice in caught.value.next_step
    assert len(store.requests) == 1


def test_s3_without_credentials_says_so_at_once(aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="extra remote")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="Unable to locate credentials") as caught:
        files(tmp_path).size("s3://bucket/s.tar")
    assert "credentials" in caught.value.next_step


def test_gs_buckets_are_read_by_googles_http_interface(
    store: HttpStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Google's servers: gcsfs asks ours as it would ask an emulator of theirs, without credentials."""
    pytest.importorskip("gcsfs", reason="extra remote")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
    about = json.dumps({"name": "s.tar", "bucket": "bucket", "size": str(SIZE)}).encode()
    for folder, content in {"download/storage": CONTENT, "storage": about}.items():
        path = tmp_path / "served" / folder / "v1" / "b" / "bucket" / "o" / "s.tar"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    remote = files(tmp_path)
    assert remote.read("gs://bucket/s.tar", IDENTITY, SIZE, 9_990, 12_345) == CONTENT[9_990 : 9_990 + 12_345]
    assert [request.range for request in store.requests] == ["bytes=0-9999", "bytes=10000-19999", "bytes=20000-29999"]
    assert remote.size("gs://bucket/s.tar") == SIZE
    assert remote.size("gs://bucket/missing.tar") is None
    store.fail(Fault(cut_after=100))
    assert remote.read("gs://bucket/s.tar", IDENTITY, SIZE, SIZE - 5, 5) == CONTENT[-5:]
    store.requests.clear()
    for status in (401, 403):
        store.fail(Fault(status=status))
        with pytest.raises(DataError, match=r"^gs://bucket/s\.tar: ") as caught:
            remote.read("gs://bucket/s.tar", "0" * 64, SIZE, 0, 1)
        assert "credentials" in caught.value.next_step
    assert len(store.requests) == 2


@pytest.mark.parametrize(("scheme", "package"), [("http", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what can't be imported
    with pytest.raises(DataError, match=f"^{scheme}://b/s.tar: {scheme}:// needs a package") as caught:
        files(tmp_path).size(f"{scheme}://b/s.tar")
    assert caught.value.next_step == "pip install 'swinv2-scale[remote]'"


def test_other_kinds_of_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^ftp://host/s\.tar: shards are read from http, https, s3, gs, pipe: and paths"
    ):
        read_all(files(tmp_path), "ftp://me:secret@host/s.tar")
