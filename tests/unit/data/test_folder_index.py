"""Manifests for shards that others made: where they go, what they keep, and that they are whole or not there."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from swinv2_scale.config.run import RemoteConfig
from swinv2_scale.data.inspection.verify import verify
from swinv2_scale.data.remote.files import RemoteFiles
from swinv2_scale.data.shards.folder_index import IndexedFolder, index_folders, tars_of
from swinv2_scale.data.shards.manifest import index_folder, read_manifest
from swinv2_scale.data.shards.reader import ShardReader
from swinv2_scale.data.shards.shard_set import expand_pattern, read_shard_set
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.errors import DataError, OutputError
from tests.support.http_store import http_store


def tar_of(path: Path, keys: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key in keys:
            for extension in ("bin", "txt"):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = 700
                file.addfile(info, io.BytesIO(b"7" * 700))
    return path


def index(pattern: str, remote: RemoteFiles | None = None, **options: object) -> list[IndexedFolder]:
    remote = remote or RemoteFiles(RemoteConfig())
    return index_folders(expand_pattern(tars_of(pattern), remote), remote, **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tar_of(tmp_path / "s" / "a.tar", ["a0", "a1"])
    tar_of(tmp_path / "s" / "b.tar", ["b0", "b1", "b2"])
    return tmp_path / "s"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_gets_its_manifest_beside_the_shards(folder: Path, processes: int) -> None:
    done: list[int] = []
    found = index(str(folder), processes=processes, on_progress=done.append)
    assert done == [1, 2]
    assert [(f.folder, f.destination) for f in found] == [(str(folder), folder)]
    manifest = read_manifest(str(folder))
    assert [(e.name, e.samples) for e in manifest.entries.values()] == [("a.tar", 2), ("b.tar", 3)]
    assert manifest.schema == {"members": {"bin": 5, "txt": 5}}
    assert read_shard_set(f"{folder}/*.tar").num_samples == 5
    assert sorted(p.name for p in folder.iterdir()) == ["a.tar", "a.tar.index", "b.tar", "b.tar.index", "manifest.json"]


def test_indexing_again_changes_no_byte(folder: Path) -> None:
    index(str(folder))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert index(str(folder))[0].changed == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_shards_of_a_manifest_stay_in_it(folder: Path) -> None:
    index(f"{folder}/a.tar")
    tar_of(folder / "b.tar", ["new"])
    found = index(f"{folder}/b.tar")[0]
    assert (found.kept, found.changed) == (1, 0)
    assert read_shard_set(f"{folder}/*.tar").sizes == (2, 1)
    tar_of(folder / "a.tar", ["a0"])
    (folder / "b.tar").unlink()
    found = index(f"{folder}/a.tar")[0]
    assert (found.kept, found.changed) == (0, 1)
    assert list(read_manifest(str(folder)).entries) == ["a.tar"]


def test_class_names_stay_as_long_as_a_shard_does(tmp_path: Path) -> None:
    raw = [{"__key__": f"k{i}", "txt": b"1", "cls": b"0"} for i in range(4)]
    write_shards(raw, tmp_path / "s", samples_per_shard=2, made_by={"command": "c"}, schema={"classes": ["cat"]})
    tar_of(tmp_path / "s" / "000001.tar", ["another"])
    index(str(tmp_path / "s"))
    manifest = read_manifest(str(tmp_path / "s"))
    assert manifest.schema == {
        "classes": ["cat"],
        "members": {"bin": 1, "cls": 2, "txt": 3},
        "labels": {"samples": 2, "smallest": 0, "largest": 0, "others": 0},
    }
    assert manifest.made_by == {"command": "swinv2-scale shards index", "of": {"command": "c"}}
    tar_of(tmp_path / "s" / "000000.tar", ["x"])
    tar_of(tmp_path / "s" / "000001.tar", ["y"])
    index(str(tmp_path / "s"))
    assert "classes" not in read_manifest(str(tmp_path / "s")).schema


def test_damage_leaves_the_old_manifest_and_indexes_as_they_were(folder: Path) -> None:
    index(str(folder))
    tar_of(folder / "a.tar", ["new"])
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:2000])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=r"b\.tar is cut or damaged at byte"):
        index(str(folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_left_out_is_written_into_the_manifest(folder: Path) -> None:
    data = bytearray((folder / "b.tar").read_bytes())
    data[5 * 1536] ^= 1  # the header of the fourth file, after three of 512 + 1024 bytes
    (folder / "b.tar").write_bytes(data)
    found = index(str(folder), skip_damaged=True)[0]
    assert [(left.shard, left.key, left.samples) for left in found.left_out] == [("b.tar", "b2", 1)]
    listed = read_manifest(str(folder)).schema["left_out"]
    assert [(item["shard"], item["key"]) for item in listed] == [("b.tar", "b2")]
    assert read_shard_set(f"{folder}/*.tar").num_samples == 4
    index(f"{folder}/a.tar")  # of the other shard
    assert read_manifest(str(folder)).schema["left_out"] == listed


def test_a_place_apart_is_used_when_it_is_asked_for_and_from_then_on(folder: Path) -> None:
    found = index(str(folder), index_dir="apart")[0]
    assert found.destination == index_folder("apart", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar", "b.tar"]
    assert read_shard_set(f"{folder}/*.tar", index_dir="apart").num_samples == 5


def test_shards_that_a_command_gives_are_indexed_in_a_place_apart(folder: Path) -> None:
    remote = RemoteFiles(RemoteConfig(allowed_commands=("cat",), cache_dir=str(folder.parent / "cache")))
    pattern = f"pipe:cat {folder}/{{a,b}}.tar"
    found = index(pattern, remote)
    assert sum(len(f.scanned) for f in found) == 2
    shards = read_shard_set(pattern, remote)
    assert shards.sizes == (2, 3)
    reader = ShardReader(shards, remote)
    assert reader.read(1, 2).key == "b2"
    reader.close()
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar", "b.tar"]


def test_shards_on_a_web_server_are_indexed_apart_read_and_verified(folder: Path) -> None:
    with http_store(folder) as store:
        remote = RemoteFiles(RemoteConfig(cache_dir=str(folder.parent / "cache"), retries=0))
        pattern = f"{store.url}/{{a,b}}.tar"
        found = index(pattern, remote)[0]
        assert found.destination.parent == Path("shards/index")
        verdict = verify(pattern, remote, "shards/index", processes=2)
        assert (verdict.is_whole, verdict.num_samples) == (True, 5)
        data = bytearray((folder / "b.tar").read_bytes())
        data[4000] ^= 1  # in the second sample
        (folder / "b.tar").write_bytes(data)
        verdict = verify(pattern, remote, "shards/index")
        assert [(d.number, d.key) for d in verdict.damaged] == [(1, "b1")]
        (folder / "a.tar").unlink()
        verdict = verify(pattern, remote, "shards/index")
        assert verdict.num_damaged == 3
        with pytest.raises(DataError, match=r"a\.tar"):
            index(pattern, remote)
    assert sorted(path.name for path in folder.iterdir()) == ["b.tar"]


def test_a_command_that_fails_leaves_nothing(folder: Path) -> None:
    code = folder.parent / "fail.py"
    code.write_text("import sys; sys.stdout.write('x' * 100); sys.exit(3)")
    remote = RemoteFiles(RemoteConfig(allowed_commands=(sys.executable,), retries=0))
    with pytest.raises(DataError):
        index(f"pipe:{sys.executable} {code} a.tar", remote)
    assert not list(folder.parent.rglob("*.index*"))
    assert not list(folder.parent.rglob("manifest.json"))


def test_a_shard_that_is_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar .* twice"):
        index(f"{folder}/a.tar::{folder}/*.tar")


def test_no_place_to_write_is_an_output_error(folder: Path) -> None:
    (folder.parent / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        index(str(folder), index_dir=str(folder.parent / "file"))


def test_a_damaged_manifest_is_replaced(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    index(str(folder))
    assert len(read_manifest(str(folder)).entries) == 2
