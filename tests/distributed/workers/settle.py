"""Settle a run that starts from weights, from another file on each rank; prints the error.

Arguments: the configuration, and a folder with RANK.safetensors.
"""

import sys

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.start import settle
from swinv2_scale.errors import ConfigError
from swinv2_scale.tasks.simmim import SimMIMTask


def main(path: str, folder: str) -> None:
    dist.start(120)
    try:
        settle(load_config(path, [f"init_from={folder}/{dist.rank()}.safetensors"]), SimMIMTask)
    except ConfigError as error:
        print(error)
    dist.barrier()
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
