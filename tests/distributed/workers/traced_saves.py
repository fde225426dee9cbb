"""Save checkpoints of a toy, every operation on files recorded.

Arguments: the folder of the run directory, the record's file, the first save's step and the last one's, and how many
checkpoints stay.
"""

import sys
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.config.run import CheckpointConfig
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.saving import Saver
from tests.distributed.workers.masters import build, step
from tests.support.file_trace import FileTrace


def main(root: str, record: str, first: int, last: int, keep: int) -> None:
    dist.start(120)
    engine, random = build(3, "bf16")
    trace = FileTrace(Path(root), Path(record))
    trace.install()
    directory = RunDirectory(Path(root) / "run")
    directory.life = dist.on_rank_zero(directory.open, "opening the run directory")
    saver = Saver(engine, directory.checkpoints, directory.staging, CheckpointConfig(keep=keep))
    step(engine, random)
    for number in range(first, last + 1):
        dist.on_rank_zero(lambda number=number: trace.mark(f"saving {number}"), "marking")  # type: ignore[misc]
        saver.begin(number, {"step": number})
        step(engine, random)  # while threads write
        saver.finish()
        dist.on_rank_zero(lambda number=number: trace.mark(f"saved {number}"), "marking")  # type: ignore[misc]
    saver.close()
    directory.close()
    dist.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
