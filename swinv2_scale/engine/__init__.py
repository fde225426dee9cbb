"""The training job on DeepSpeed."""
