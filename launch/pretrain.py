"""Pre-train a Swin V2 with SimMIM: deepspeed launch/pretrain.py --config configs/quickstart/simmim.yaml"""

import sys

from swinv2_scale.cli.train import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
