"""A configuration that trains in seconds with everything switched on, and its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL_RUN = """
model:
  variant: tiny
  image_size: 32
  in_channels: 1
  embed_dim: 16
  depths: [2, 2]
  num_heads: [2, 4]
  window_size: 4
  drop_path_rate: 0.2
data:
  train: embedded:fashion-mnist/train
  validation: embedded:fashion-mnist/validation
  shards_dir: {shards}
  global_batch_size: 16
  micro_batch_size: 4
  num_workers: 1
  pixel_mean: [0.286]
  pixel_std: [0.353]
task:
  mask_patch_size: 4
optim:
  lr: 2.0e-3
  warmup_steps: 5
  total_steps: 30
engine:
  zero_stage: 3
  precision: bf16
  activation_checkpointing: {{backend: torch}}
  reduce_bucket_elements: 100_000
  prefetch_bucket_elements: 10_000
  param_persistence_elements: 300
checkpoint:
  every_steps: 7
evaluation:
  every_steps: 10
  samples: 24
logging:
  panel_every_steps: 10
  panel_images: 4
  console_every_steps: 5
cluster:
  timeout_s: 150
  step_timeout_s: 150
"""

#: Overrides for tests that are about the data: the engine's part takes a fifth of the time.
LIGHT = (
    *("engine.zero_stage=0", "engine.precision=fp32", "engine.activation_checkpointing.backend=none"),
    *("model.depths=[1,1]", "logging.panel_every_steps=0", "logging.tensorboard=false"),
)

#: What two runs of the same training have in common, to the last bit.
COMPARED = ("step", "loss", "lr", "grad_norm", "samples_seen", "data_digest", "validation_loss")


def write_config(folder: Path, shards: Path, **replacements: str) -> Path:
    """Write the small run's YAML into a folder, some texts replaced."""
    text = SMALL_RUN.format(shards=shards)
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: row.get(key) for key in COMPARED} for row in map(json.loads, lines)]
