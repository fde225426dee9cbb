"""Which checkpoint all ranks take from each folder of a folder; every rank prints its own answers, as JSON."""

import json
import sys
from pathlib import Path

from swinv2_scale import dist
from swinv2_scale.engine import checkpoint
from swinv2_scale.errors import CheckpointError
from swinv2_scale.telemetry.console import start_logging


def main(root: str) -> None:
    start_logging(dist.rank())
    dist.start(120)
    verdicts: dict[str, str] = {}
    for folder in sorted(Path(root).iterdir()):
        try:
            found = checkpoint.newest_verified(folder)
            verdicts[folder.name] = found.path.name if found else "none"
        except CheckpointError as error:
            verdicts[folder.name] = error.message
    print("RESULT " + json.dumps(verdicts))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
