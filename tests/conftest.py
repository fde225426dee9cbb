"""Shards that are written once for the whole session."""

from pathlib import Path

import pytest

from swinv2_scale.data.sources.embedded import embedded_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that embedded data sets were written to."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "validation"):
        embedded_shards(f"embedded:fashion-mnist/{split}", folder)
    return folder
