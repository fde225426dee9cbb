"""F7: a run directory that holds another run than the one that is asked for. All in this process, nothing to wait for.

That a whole job ends with 78, one error and an untouched run directory is test_bad_input.py's.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from swinv2_scale.config.loader import load_config
from swinv2_scale.config.rules import resume_policy
from swinv2_scale.config.run import RunConfig
from swinv2_scale.config.source import as_tuples
from swinv2_scale.data.shards.shard_set import ShardSet, read_shard_set
from swinv2_scale.engine.resume import _compare_runs, facts_of, plain
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.errors import ConfigError, DataError, ExitCode
from swinv2_scale.telemetry.console import log
from tests.support.small_run import SMALL_RUN, write_config

KEYS = list(plain(RunConfig.model_validate(as_tuples(yaml.safe_load(SMALL_RUN.format(shards="shards"))))))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(write_config(tmp_path_factory.mktemp("config"), Path("shards"))).config


@pytest.fixture(scope="module")
def train(shards: Path) -> ShardSet:
    return read_shard_set(f"{shards}/fashion-mnist/train/*.tar")


def compare(asked: RunConfig, train: ShardSet, folder: Path, **saved: Any) -> None:
    facts = facts_of(asked, train, ())
    _compare_runs({**facts, "config": facts["config"] | saved}, asked, train, RunDirectory(folder))


def other(value: Any) -> Any:
    """Another value, as the checkpoint's JSON would have it."""
    return not value if isinstance(value, bool) else [value, "another"]


@pytest.mark.parametrize("key", [key for key in KEYS if resume_policy(key) == "fixed"])
def test_f07_a_key_that_makes_another_training_is_refused_with_both_values(
    key: str, asked: RunConfig, train: ShardSet, tmp_path: Path
) -> None:
    now = plain(asked)[key]
    with pytest.raises(ConfigError) as refusal:
        compare(asked, train, tmp_path, **{key: other(now)})
    assert refusal.value.exit_code == ExitCode.BAD_CONFIG == 78
    assert f"\n  - {key}: was {other(now)!r}, now {now!r} - may not change" in str(refusal.value)
    assert str(tmp_path) in refusal.value.message
    assert refusal.value.next_step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [key for key in KEYS if resume_policy(key) != "fixed"])
def test_f07_a_key_that_may_change_is_said_with_what_that_does(
    key: str,
    asked: RunConfig,
    train: ShardSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = plain(asked)[key]
    with caplog.at_level(logging.INFO, log().name):
        compare(asked, train, tmp_path, **{key: other(now)})
    verdict = "may change, changes the numbers" if resume_policy(key) == "warn" else "may change"
    assert caplog.messages == [f"changed since the checkpoint: {key}: was {other(now)!r}, now {now!r} - {verdict}"]


def test_f07_every_difference_is_listed_at_once(asked: RunConfig, train: ShardSet, tmp_path: Path) -> None:
    flat = plain(asked)
    with pytest.raises(ConfigError) as refusal:
        compare(asked, train, tmp_path, **{key: other(value) for key, value in flat.items()}, gone=1)
    lines = str(refusal.value).splitlines()[1:-1]
    assert [line.partition(":")[0] for line in lines] == [f"  - {key}" for key in (*flat, "gone")]
    assert lines[-1] == "  - gone: was 1, now None - may not change"


def test_f07_other_shards_are_another_training_wherever_they_lie(
    asked: RunConfig, train: ShardSet, tmp_path: Path
) -> None:
    facts = facts_of(asked, train, ())
    _compare_runs(json.loads(json.dumps(facts)), asked, train, RunDirectory(tmp_path))
    with pytest.raises(DataError, match="training shards are not the ones"):
        _compare_runs({**facts, "train_digest": "0"}, asked, train, RunDirectory(tmp_path))
