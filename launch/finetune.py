"""Go on from trained weights: deepspeed launch/finetune.py --config FILE init_from=runs/PRETRAINING"""

import sys

from swinv2_scale.cli.train import finetune

if __name__ == "__main__":
    sys.exit(finetune())
