"""A real training whose shards lie behind HTTP, in S3, or come out of a command, against the same from a disk."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from swinv2_scale.data.shards.manifest import index_folder, split_location
from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from tests.support.http_store import Fault, http_store
from tests.support.processes import pretrain
from tests.support.small_run import LIGHT, metrics, write_config

#: A matter of time alone: `make test` has eight minutes.
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "train"
    write_shards(islice(fashion_mnist("train"), 160), folder, samples_per_shard=20, made_by="a test")
    return folder


@pytest.fixture(scope="module")
def from_disk(tmp_path_factory: pytest.TempPathFactory, source: Path, shards: Path) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("from_disk")
    config = write_config(folder, shards)
    finished = pretrain(
        "--config", config, "--run-dir", folder / "run", "--steps", 12, f"data.train={source}/*.tar", *LIGHT
    )
    assert finished.code == 0, finished.output
    return metrics(folder / "run")


def train(folder: Path, shards: Path, *overrides: str, processes: int = 2) -> Any:
    config = write_config(folder, shards)
    options = ("--steps", 12, f"data.remote.cache_dir={folder}/cache", f"data.index_dir={folder}/index")
    return pretrain("--config", config, "--run-dir", folder / "run", *options, *overrides, *LIGHT, processes=processes)


def digests(rows: list[dict[str, Any]]) -> list[str]:
    return [row["data_digest"] for row in rows]


def test_over_http_with_failures_two_ranks_see_the_same_batches_and_fetch_each_block_once(
    tmp_path: Path, shards: Path, source: Path, from_disk: list[dict[str, Any]]
) -> None:
    with http_store(source) as store:
        store.fail(Fault(status=503), Fault(reset=True))
        finished = train(tmp_path, shards, f"data.train={store.url}/{{000000..000007}}.tar", "data.num_workers=2")
        assert finished.code == 0, finished.output
        # One byte tells a file's size; the manifest is read past the cache.
        ranges = [(r.path, r.range) for r in store.requests if r.range != "bytes=0-0" and r.path != "/manifest.json"]
        # Eight shards and their indexes, a block each, fetched once by four workers of two ranks.
        assert len(ranges) == len(set(ranges)) == 16
    assert digests(metrics(tmp_path / "run")) == digests(from_disk)


def test_a_server_that_goes_away_ends_the_run_with_65_on_every_rank(tmp_path: Path, shards: Path, source: Path) -> None:
    with http_store(source) as store:
        url = store.url
    finished = train(tmp_path, shards, f"data.train={url}/{{000000..000007}}.tar", "data.remote.retries=1")
    assert finished.codes == [65, 65], finished.output
    assert finished.output.count("\nerror: ") == 1
    assert url in finished.output


def test_a_missing_and_a_cut_remote_shard_are_quarantined_as_local_ones_are(
    tmp_path: Path, shards: Path, source: Path
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(source, folder)
    (folder / "000003.tar").unlink()
    cut = folder / "000005.tar"
    cut.write_bytes(cut.read_bytes()[:-4096])
    with http_store(folder) as store:
        options = (f"data.train={store.url}/{{000000..000007}}.tar", "data.max_quarantined_share=0.3")
        finished = train(tmp_path, shards, *options, processes=1)
    assert finished.code == 0, finished.output
    # Twenty samples of the shard that is gone; of the other no byte is trusted, since its size is another.
    assert "epoch 0 is over: 120 samples read + 40 in quarantine" in finished.output


def test_a_command_gives_the_same_batches_when_it_is_allowed_and_is_refused_when_not(
    tmp_path: Path, shards: Path, source: Path, from_disk: list[dict[str, Any]]
) -> None:
    pattern = f"pipe:cat {source}/{{000000..000007}}.tar"
    index = tmp_path / "index"
    folder, _ = split_location(f"pipe:cat {source}/000000.tar")
    apart = index_folder(str(index), folder)
    apart.mkdir(parents=True)
    for path in (*source.glob("*.index"), source / "manifest.json"):
        shutil.copy(path, apart)
    refused = train(tmp_path, shards, f"data.train={pattern}")
    assert refused.code == 78, refused.output
    assert "data.remote.allowed_commands" in refused.output
    assert "Traceback" not in refused.output
    finished = train(tmp_path, shards, f"data.train={pattern}", 'data.remote.allowed_commands=["cat"]')
    assert finished.code == 0, finished.output
    assert digests(metrics(tmp_path / "run")) == digests(from_disk)


def test_a_mixture_keeps_its_weights_and_its_epochs(tmp_path: Path, shards: Path, source: Path) -> None:
    patterns = [f"{source}/00000[0-1].tar", f"{source}/00000[2-7].tar"]
    finished = train(tmp_path, shards, f"data.train={json.dumps(patterns)}", "data.train_weights=[1, 1]", processes=1)
    assert finished.code == 0, finished.output
    # 12 steps of 16, half from each: 96 of 40 samples are two epochs, 96 of 120 less than one.
    for epoch in (0, 1):
        assert f"epoch {epoch} of {patterns[0]} is over: 40 samples read" in finished.output
    assert patterns[1] not in finished.output.partition("is over")[2]
