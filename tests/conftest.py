"""Shards that are written once for the whole session, and a logger that no test inherits from another."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinv2_scale.data.sources.embedded import embedded_shards
from swinv2_scale.telemetry.console import log


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that embedded data sets were written to."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "validation"):
        embedded_shards(f"embedded:fashion-mnist/{split}", folder)
    return folder


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A job inside a test's process takes the package's logger for itself; the next test finds it as it was."""
    logger = log()
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]
    logging.captureWarnings(False)
