"""SwinV2-G's first stage, narrow, built under ``zero.Init`` with its first values; prints a digest of each rank's part.

Arguments: the configuration, then overrides.
"""

import hashlib
import sys

from swinv2_scale import dist
from swinv2_scale.config.loader import load_config
from swinv2_scale.engine import zero
from swinv2_scale.engine.deepspeed_config import translate
from swinv2_scale.engine.start import first_values
from swinv2_scale.tasks.simmim import SimMIMTask


def main(path: str, *overrides: str) -> None:
    dist.start(240)
    config = load_config(path, list(overrides)).config
    model = zero.build(SimMIMTask(config).build_model, translate(config, dist.world_size()))
    zero.assign(model, first_values(model, zero.full_shapes(model), config, None))
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        size = parameter.ds_tensor.numel()  # the last rank's part ends in padding
        mine = parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - size * dist.rank()))]
        sha.update(name.encode() + mine.detach().float().numpy().tobytes())
    digests = dist.gather(sha.hexdigest())
    if dist.rank() == 0:
        print("RESULT " + " ".join(digests))
    dist.barrier()
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
