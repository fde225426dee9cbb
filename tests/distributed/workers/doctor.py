"""``swinv2-scale doctor`` in one rank of a job, with shorter waits, and something wrong with rank 1."""

import os
import signal
import sys

from swinv2_scale import dist
from swinv2_scale.cli.main import main
from swinv2_scale.engine.doctor import examine, group

JOIN_S = 4


def behave(fault: str) -> list[str]:
    """What rank 1 does or has that rank 0 doesn't; returns overrides of its configuration."""
    examine._JOIN_S, examine._LOCAL_S, group._BUDGET_S, group._EACH_S = JOIN_S, 3, 1.0, 0.1
    if dist.rank() == 0:
        return []
    if fault == "never comes":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "stops after joining":
        dist.start(JOIN_S)
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "another configuration":
        os.environ["NCCL_DEBUG"] = "INFO"
        return ["optim.lr=0.5"]
    return []


if __name__ == "__main__":
    fault, config, *words = sys.argv[1:]
    sys.exit(main(["doctor", config, *behave(fault), *words]))
