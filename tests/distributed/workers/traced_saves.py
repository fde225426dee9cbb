"""Save checkpoints of a toy, every operation on files recorded.

Arguments: the folder of the run directory, the record's file, how many saves, and how many checkpoints stay.
"""

import sys
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.engine import checkpoint
from swinv2_scale.engine.run_dir import RunDirectory
from swinv2_scale.engine.step import TrainState
from tests.distributed.workers.masters import build, step
from tests.support.file_trace import FileTrace


def main(root: str, record: str, num_saves: int, keep: int) -> None:
    dist.start(120)
    engine, random = build(3, "bf16")
    trace = FileTrace(Path(root), Path(record))
    trace.install()
    directory = RunDirectory(Path(root) / "run")
    if dist.rank() == 0:
        directory.open()
    dist.barrier()
    for number in range(1, num_saves + 1):
        step(engine, random)
        if dist.rank() == 0:
            trace.mark(f"saving {number}")
        dist.barrier()
        checkpoint.publish(engine, directory.checkpoints, TrainState(step=number), {}, keep)
        if dist.rank() == 0:
            trace.mark(f"saved {number}")
    dist.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
