"""F26: of two jobs on one run directory only one can publish, whatever the file system knows about locks."""

import signal
from pathlib import Path

from swinv2_scale.engine import checkpoint
from tests.support.processes import pretrain, start_pretrain, wait_for_step
from tests.support.small_run import LIGHT, metrics, write_config

#: A job that is still at work when the other one has begun and ended.
LONG = (*LIGHT, "optim.total_steps=400", "checkpoint.every_steps=4", "evaluation.every_steps=0")


def test_f26_a_life_that_wakes_up_after_another_took_over_publishes_nothing(tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    command = ("--config", write_config(tmp_path, shards), "--run-dir", run, *LONG)
    stale = start_pretrain(*command)
    wait_for_step(run, 6, stale)
    stale.ranks[0].send_signal(signal.SIGSTOP)
    try:
        refused = pretrain(*command)
        assert refused.code == 73
        assert f"is in use by pid {stale.ranks[0].pid}" in refused.output

        (run / ".lock").unlink()  # what locks are worth on a file system that keeps none between nodes
        after = pretrain(*command, "--steps", 16)
        assert after.code == 0, after.output
        published = [(c.step, c.saved) for c in checkpoint.find(run / "checkpoints")]
        rows = metrics(run)
    finally:
        stale.ranks[0].send_signal(signal.SIGCONT)
    ended = stale.wait()
    assert ended.code == 73, ended.output
    assert f"{run} was taken over by a later job" in ended.output
    assert "Traceback" not in ended.output
    assert [(c.step, c.saved) for c in checkpoint.find(run / "checkpoints")] == published
    assert published[0][0] == 16
    assert metrics(run) == rows
    assert [row["step"] for row in rows] == list(range(1, 17))
    again = pretrain(*command, "--steps", 18)
    assert again.code == 0, again.output
    assert "step 16, every file verified" in again.output
