"""What rank 0 writes while training: metrics, TensorBoard, panels, and the run's own records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL.Image import Image

from swinv2_scale import dist
from swinv2_scale.config.loader import LoadedConfig, to_yaml
from swinv2_scale.data.ledger import Quarantined
from swinv2_scale.durable import write_whole
from swinv2_scale.engine.checkpoint import Checkpoint
from swinv2_scale.engine.resume import versions
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.step import TrainState
from swinv2_scale.telemetry.metrics import MetricsFile, read_metrics
from swinv2_scale.telemetry.tensorboard import TensorBoard

_IDENTITY = {"use", "epoch", "position"}


class Output:
    """The open files of a run; made by rank 0 alone, while it holds the run directory's lock.

    Args:
        state: what was written after it belongs to a future that is trained anew.
        found: the checkpoint it is from; brings back the lists that the run directory has lost.

    Raises:
        OSError: something can't be written.
    """

    def __init__(
        self, loaded: LoadedConfig, directory: RunDirectory, state: TrainState, found: Checkpoint | None
    ) -> None:
        directory.write_config(to_yaml(loaded))
        directory.step = state.step
        directory.record_life(from_step=state.step, world_size=dist.world_size(), **versions())
        self._directory = directory
        if found:
            self._bring_back(found)
        self._has_board = loaded.config.logging.tensorboard
        # By position, which a rewind doesn't turn back: what led to one that a checkpoint knows of stays.
        self._anomalies = MetricsFile(directory.anomalies, state.samples_seen, key="samples_seen")
        self._open(state.step)

    def _open(self, step: int) -> None:
        self._metrics = MetricsFile(self._directory.metrics, step)
        self._quarantine = MetricsFile(self._directory.quarantine, step)
        rows = read_metrics(self._directory.quarantine)
        self._listed = {_identity(row) for row in rows if row.keys() >= _IDENTITY}
        self._board = TensorBoard(self._directory.tensorboard, step) if self._has_board else None

    def _bring_back(self, found: Checkpoint) -> None:
        names = {record.name for record in found.files}
        for path in self._lists:
            if path.name in names and not path.exists():
                write_whole(path, (found.path / path.name).read_bytes())

    @property
    def _lists(self) -> tuple[Path, ...]:
        return self._directory.quarantine, self._directory.anomalies

    def rewind(self, step: int) -> None:
        """Forget what was written after a step, but for the anomalies."""
        self._close()
        self._open(step)
        self._directory.step = step

    def row(self, row: dict[str, Any]) -> None:
        """One step's metrics."""
        self._metrics.write(row)
        self._directory.step = row["step"]
        if self._board:
            self._board.row(row)

    def quarantine(self, lost: Iterable[Quarantined], step: int, use: str) -> int:
        """List samples that couldn't be used, each once an epoch.

        Returns:
            how many of them weren't listed yet.
        """
        rows = [{"step": step, "use": use, **asdict(sample)} for sample in sorted(lost, key=lambda q: q.position)]
        new = [row for row in rows if _identity(row) not in self._listed]
        for row in new:
            self._quarantine.write(row)
            self._listed.add(_identity(row))
        return len(new)

    def anomaly(self, row: dict[str, Any]) -> None:
        """One row about something unusual."""
        self._anomalies.write(row)

    def panel(self, image: Image, step: int, kind: str = "") -> None:
        """One step's picture; of several, each of its own kind."""
        image.save(self._directory.panels / f"step-{step:08d}{kind and '-'}{kind}.png")
        if self._board:
            self._board.image(kind or "panel", image, step)

    def sync(self) -> dict[str, bytes]:
        """Before a checkpoint says that the steps so far exist.

        Returns:
            the lists that it keeps, by file name.
        """
        self._metrics.sync()
        self._quarantine.sync()
        self._anomalies.sync()
        return {path.name: path.read_bytes() for path in self._lists}

    def close(self) -> None:
        self._anomalies.close()
        self._close()

    def _close(self) -> None:
        self._metrics.close()
        self._quarantine.close()
        if self._board:
            self._board.close()


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in sorted(_IDENTITY))
