"""RunConfig: everything one job needs, and nothing that it works out for itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from swinv2_scale.config.model import (
    Fraction,
    ModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from swinv2_scale.config.tasks import TaskConfig

#: A path, a brace pattern (``train-{000000..000127}.tar``), a glob, several joined with ``::``, ``embedded:NAME``,
#: ``http(s)://``, ``s3://``, ``gs://``, or ``pipe:COMMAND`` where ``data.remote.allowed_commands`` has the command.
ShardPattern = str | tuple[str, ...]


def patterns_of(pattern: str | Iterable[str]) -> list[str]:
    """The patterns that are joined with ``::`` or listed."""
    return [part for item in ([pattern] if isinstance(pattern, str) else pattern) for part in item.split("::")]


class RemoteConfig(Section):
    """Shards that don't lie on a disk of this node."""

    #: Blocks of remote shards, shared by the processes of a node; what was used longest ago goes first.
    cache_dir: str = "shards/cache"
    cache_bytes: PositiveInt = 64 * 2**30
    #: How long a store may stay silent; then it is asked again.
    timeout_s: PositiveFloat = 30.0
    #: So many times, waiting longer each time, up to half a minute.
    retries: NonNegativeInt = 6
    #: Programs that a ``pipe:`` shard may start, by name: ("aws",). No shell is involved.
    allowed_commands: tuple[str, ...] = ()


class DataConfig(Section):
    """Which samples, how many at a time, and how they are read."""

    train: ShardPattern
    #: One weight for each pattern of ``train``: samples are drawn from them in these proportions, each data set in its
    #: own epochs. None: all patterns are one data set.
    train_weights: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] | None = None
    validation: ShardPattern | None = None
    global_batch_size: PositiveInt
    #: Samples of one process at once; accumulation follows: global / (micro * processes).
    micro_batch_size: PositiveInt
    num_workers: NonNegativeInt = 2
    #: Batches that each worker keeps ready, as far as ``prefetch_bytes`` allows.
    prefetch_batches: PositiveInt = 2
    #: Memory that a process's batches may take, from the workers that make them to the step that trains on them.
    prefetch_bytes: PositiveInt = 4 * 2**30
    shuffle: bool = True
    #: Samples are mixed over this many shards at a time; reading stays inside them.
    shuffle_shards: PositiveInt = 64
    #: Where ``embedded:`` data sets are written as tars on their first use.
    shards_dir: str = "shards"
    #: Where the manifests of shards lie that have none beside them (``swinv2-scale shards index`` writes here).
    index_dir: str = "shards/index"
    remote: RemoteConfig = RemoteConfig()
    #: At most this share of a data set's samples may be damaged in one epoch: each is listed in RUN/quarantine.jsonl
    #: and replaced by another, the same one whatever the number of ranks. 0: the first one stops the run.
    max_quarantined_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    #: How training decodes. ``fast``: JPEGs at the scale that the crop needs, resized by OpenCV; ``exact``: Pillow, as
    #: evaluation always does.
    decoder: Literal["fast", "exact"] = "fast"
    #: Type of the pixels that the model gets: 16-bit images keep their bits as uint16, ``.npy`` its values as float32.
    pixel_type: Literal["uint8", "uint16", "float32"] = "uint8"
    #: Larger images are damaged ones (a decompression bomb); Pillow's own limit.
    max_image_pixels: PositiveInt = 89_478_485
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)


class OptimConfig(Section):
    """AdamW, clipping, and a schedule that is a function of the step alone."""

    lr: PositiveFloat
    total_steps: PositiveInt
    warmup_steps: NonNegativeInt = 0
    warmup_lr: NonNegativeFloat = 0.0
    min_lr: NonNegativeFloat = 0.0
    #: What follows the warm-up, over the rest of ``total_steps``: half a ``cosine`` or a ``linear`` fall to ``min_lr``;
    #: ``multistep``: ``lr`` times ``gamma`` for every milestone that was passed.
    schedule: Literal["cosine", "linear", "multistep"] = "cosine"
    #: Of ``multistep``: steps, ascending.
    milestones: tuple[PositiveInt, ...] = ()
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    #: The head learns with ``lr``, each layer below it with this times the rate of the one above (numbered as in the
    #: released code), so that early layers of trained weights change less. 1: all the same.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    #: Largest global gradient norm; 0: no clipping.
    clip_grad_norm: NonNegativeFloat = 5.0
    #: Decay of an exponential moving average of the weights, float32 and sharded as the optimizer's moments: 0.9999,
    #: say. None: none is kept.
    ema_decay: Fraction | None = None


class ActivationCheckpointingConfig(Section):
    """Recompute each block in backward instead of keeping its activations."""

    backend: Literal["none", "torch", "fairscale"] = "none"
    #: Keep the block inputs in host memory.
    offload: bool = False


class OffloadConfig(Section):
    """What lies elsewhere than in a GPU's memory (without GPUs: elsewhere than in memory), and is fetched when needed.

    ``cpu``: in host memory. ``nvme``: in files, at ZeRO stage 3.
    """

    #: Float32 masters, moments and average; AdamW then steps on the host's processors.
    optimizer_states: Literal["none", "cpu", "nvme"] = "none"
    #: The weights that the model computes with; ZeRO stage 3.
    parameters: Literal["none", "cpu", "nvme"] = "none"
    #: A folder on each node's fastest disk. It is scratch: no checkpoint needs it, and a job deletes what it put there.
    nvme_dir: str | None = None
    #: Optimizer states are read, stepped and written so many parameters at a time (and one parameter more). Four or
    #: five float32 buffers of this size stay in memory.
    sub_group_elements: PositiveInt = 50_000_000

    @property
    def uses_nvme(self) -> bool:
        return "nvme" in (self.optimizer_states, self.parameters)


class EngineConfig(Section):
    """DeepSpeed, typed: every key here is translated, sent, and read back from the live engine."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    #: ``bf16``: weights and activations in bfloat16, float32 masters. ``bf16_autocast``: float32 weights.
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "bf16"
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    offload: OffloadConfig = OffloadConfig()
    overlap_comm: bool = True
    reduce_bucket_elements: PositiveInt = 500_000_000
    #: ZeRO-3: elements gathered ahead of use; one block of G is 50 million.
    prefetch_bucket_elements: NonNegativeInt = 100_000_000
    #: ZeRO-3: parameters smaller than this stay on every rank, where each is gathered by itself after every update.
    #: None is the fastest, as blocks are brought whole in any case (benchmarks/zero3.py).
    param_persistence_elements: NonNegativeInt = 0
    max_live_elements: NonNegativeInt = 1_000_000_000
    #: Other DeepSpeed settings, for experts; checked key by key, and none that this file already has a key for.
    deepspeed_overrides: dict[str, Any] = Field(default_factory=dict)


class AnomaliesConfig(Section):
    """Losses and gradients that are not finite, or far above what they were; all of them go to RUN/anomalies.jsonl.

    An update that isn't finite is never taken. A spike is one of a loss or a gradient norm that is finite.
    """

    #: What a spike leads to. ``warn``: say so, take the update. ``skip``: leave the batch out, every weight stays as it
    #: was. ``rewind``: go back to the last checkpoint and leave out all samples since. ``stop``: end the job with 70.
    policy: Literal["warn", "skip", "rewind", "stop"] = "warn"
    #: A loss is a spike so many standard deviations above its running mean (the deviation counts as 1 % of the mean at
    #: least). Losses of batches are nearly normal: 8 is beyond chance, and spikes of divergence are hundreds.
    loss_z: PositiveFloat = 8.0
    #: A gradient norm is a spike so many times above its running mean. Norms are skewed, a few times is usual.
    grad_norm_factor: Annotated[float, Field(gt=1)] = 20.0
    #: So many updates make the means before spikes are looked for.
    warmup_steps: PositiveInt = 100
    #: The running means forget as plain ones over so many updates would.
    window_steps: Annotated[int, Field(ge=2)] = 100
    #: So many updates in a row may be refused, for whatever reason; one more leads to a rewind.
    max_skipped_steps: NonNegativeInt = 10
    #: So many rewinds may be in a run; what would be one more stops the job with 70.
    max_rewinds: NonNegativeInt = 2


class CheckpointConfig(Section):
    """When to save and what to keep; a checkpoint is always written at the end and when the job is stopped."""

    every_steps: PositiveInt = 1000
    #: The newest so many that are whole; each is read back once before an older one goes.
    keep: Annotated[int, Field(ge=2)] = 3
    #: Beside them, those of steps that this divides; None: no others.
    keep_every_steps: PositiveInt | None = None
    #: Beside them, so many that ``evaluation.metric`` finds best; needs a checkpoint wherever there is a validation.
    keep_best: NonNegativeInt = 0
    #: Training goes on while a checkpoint is written; it takes the memory of what this process writes once more.
    asynchronous: bool = True


class EvaluationConfig(Section):
    """Metrics on held-back shards, with fixed crops and fixed masks."""

    #: 0: only at the end.
    every_steps: NonNegativeInt = 1000
    #: At most so many samples of the validation shards, the first ones; None: all of them.
    samples: PositiveInt | None = 1024
    #: What ``checkpoint.keep_best`` and ``patience`` judge by: the smallest loss, or the largest top-1 accuracy.
    metric: Literal["loss", "top1"] = "loss"
    #: Stop after so many validations in a row that weren't better than the best one before; None: never.
    patience: PositiveInt | None = None


class LoggingConfig(Section):
    """What a running job shows."""

    console_every_steps: PositiveInt = 10
    tensorboard: bool = True
    #: 0: only at the end.
    panel_every_steps: NonNegativeInt = 1000
    panel_images: PositiveInt = 8
    #: The largest output of every block goes into the metrics (the paper's fig. 2); 0: only when something is wrong.
    amplitudes_every_steps: NonNegativeInt = 1000


class ClusterConfig(Section):
    """What the launcher is expected to have started; a mismatch stops the job instead of training on less."""

    num_nodes: PositiveInt | None = None
    world_size: PositiveInt | None = None
    #: How long the ranks may take to find each other, for the first step, and for whatever isn't a step: opening the
    #: data, building the model, validation, panels, checkpoints. A collective never waits longer for a rank.
    timeout_s: PositiveInt = 1800
    #: How long any later step may take, with the wait for its samples; then the job ends with 75 and says who is late.
    step_timeout_s: PositiveInt = 300
    #: A job under Slurm stops and saves so long before its time limit, and the longest step that it has seen.
    grace_s: NonNegativeInt = 120


class RunConfig(Section):
    """One job: one stage of a recipe, in one run directory."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    anomalies: AnomaliesConfig = AnomaliesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
    seed: NonNegativeInt = 0
    #: Weights that a fresh run starts from: Microsoft's .pth, a Hugging Face folder, timm's, torchvision's or our file,
    #: a run or a checkpoint of ours. A run that has a checkpoint of its own goes on from that.
    init_from: str | None = None
