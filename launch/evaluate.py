"""Measure a classifier on data.validation, one sample counted once: deepspeed launch/evaluate.py --config FILE"""

import sys

from swinv2_scale.cli.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
