"""Kill a real run, at a chosen step or in a random moment of a chosen kind, and start it again by the same command."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from swinv2_scale.data.shards.writer import write_shards
from swinv2_scale.data.sources.embedded import fashion_mnist
from swinv2_scale.engine.checkpoint import open_run_or_checkpoint
from swinv2_scale.engine.consolidate import SavedTensors
from swinv2_scale.engine.random_states import file_name
from swinv2_scale.errors import CheckpointError
from tests.support.processes import REPOSITORY, Finished, Job, start_pretrain
from tests.support.small_run import metrics

#: Samples of a step.
BATCH = 4
#: The quick start at a hundredth of its cost, with all that a resumption could get wrong switched on: ZeRO-3, bf16,
#: recomputed activations, attention in pieces, drop path (0.1 in the YAML), masks, augmentation, two workers.
OVERRIDES = (
    *("model.embed_dim=8", "model.depths=[1,2]", "model.num_heads=[1,2]"),
    *("model.attention.backend=sequential", "model.attention.max_score_bytes=4096"),
    *(f"data.global_batch_size={BATCH}", "data.micro_batch_size=2", "data.num_workers=2"),
    *("engine.zero_stage=3", "engine.precision=bf16", "engine.activation_checkpointing.backend=torch"),
    *("engine.reduce_bucket_elements=100_000", "engine.prefetch_bucket_elements=10_000"),
    *("engine.param_persistence_elements=300", "optim.warmup_steps=5"),
    *("evaluation.every_steps=10", "evaluation.samples=8", "logging.panel_every_steps=0", "logging.tensorboard=false"),
)
#: Where a life can be killed.
KINDS = ("start-up", "load", "step", "save", "epoch turn")
PEER_LOST = 75


@dataclass(frozen=True)
class Course:
    """A training as it is typed, but for its run directory."""

    shards: Path
    total_steps: int
    save_every: int
    #: Samples of an epoch; 0: all of the quick start's.
    epoch: int = 0

    @property
    def arguments(self) -> list[str]:
        """Of launch/pretrain.py; writes the shards of a short epoch when they aren't there."""
        steps = [f"optim.total_steps={self.total_steps}", f"checkpoint.every_steps={self.save_every}"]
        # A rank that is killed before it joins leaves the other waiting so long.
        data = [f"data.shards_dir={self.shards}", "cluster.timeout_s=60"]
        if self.epoch:
            folder = self.shards / f"epoch-of-{self.epoch}"
            if not folder.exists():
                samples = islice(fashion_mnist("train"), self.epoch)
                write_shards(samples, folder, samples_per_shard=self.epoch // 3, made_by="a test")
            data.append(f"data.train={folder}/*.tar")
        return ["--config", str(REPOSITORY / "configs/quickstart/simmim.yaml"), *OVERRIDES, *steps, *data]

    def start(self, run: Path) -> Life:
        """By two processes."""
        lives, rows = len(_starts(run)), _lines(run / "metrics.jsonl")
        return Life(run, start_pretrain(*self.arguments, "--run-dir", run, processes=2), lives, rows)

    def finish(self, run: Path) -> End:
        """Run to the end, which has to succeed."""
        finished = self.start(run).job.wait(at_most_s=5 * self.total_steps + 120)
        assert finished.codes == [0, 0], finished.output
        return End.of(run)


@dataclass(frozen=True)
class End:
    """All that a finished run is judged by: no times in it."""

    rows: list[dict[str, Any]]
    #: SHA-256 of every float32 master and both of its moments.
    tensors: str
    #: Of torch's global random generators; Python's begins anew in each process.
    generators: str

    @classmethod
    def of(cls, run: Path) -> End:
        checkpoint = open_run_or_checkpoint(run)
        saved = SavedTensors(checkpoint)
        sha = hashlib.sha256()
        for name in saved.shapes:
            for kind in sorted(saved.kinds):  # masters and Adam's moments
                sha.update(f"{name} {kind}".encode() + saved.tensor(name, kind).numpy().tobytes())
        generators = hashlib.sha256()
        for rank in range(checkpoint.world_size):
            states = torch.load(checkpoint.path / file_name(rank), weights_only=True)
            generators.update(states["torch"].numpy().tobytes())
        return cls(metrics(run), sha.hexdigest(), generators.hexdigest())

    @property
    def trace(self) -> str:
        """Of steps, losses, learning rates, gradient norms, sample counts and data digests."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class Life:
    """One start of a run."""

    run: Path
    job: Job
    lives_before: int
    rows_before: list[str]

    @property
    def has_loaded(self) -> bool:
        """Whether training comes next: the line of this life is written when the checkpoint is loaded."""
        return len(_starts(self.run)) > self.lives_before

    @property
    def step(self) -> int:
        """The last one of this life, 0 before it has made one."""
        rows = _lines(self.run / "metrics.jsonl") if self.has_loaded else []
        if rows in ([], self.rows_before):  # those of a dropped future are still there
            return 0
        return int(json.loads(rows[-1])["step"]) if len(rows) > self.from_step else 0

    @property
    def from_step(self) -> int:
        return int(json.loads(_starts(self.run)[-1])["from_step"])

    @property
    def is_saving(self) -> bool:
        # What an earlier life left there is removed before has_loaded.
        return self.has_loaded and any((self.run / "checkpoints").glob(".part-*/step-*"))

    def has_said(self, words: str) -> bool:
        return words in self.job.ranks[0].output

    def until(self, condition: Callable[[], bool], at_most_s: float = 240.0) -> bool:
        """Wait; False if the time is over, or the job."""
        end = time.monotonic() + at_most_s
        while not condition():
            if time.monotonic() > end or any(rank.poll() is not None for rank in self.job.ranks):
                return False
            time.sleep(0.003)
        return True

    def kill(self, *victims: int) -> Finished:
        """SIGKILL to these ranks; the others have to end by themselves."""
        for rank in victims:
            self.job.ranks[rank].send_signal(signal.SIGKILL)
        return self.job.wait()


@dataclass(frozen=True)
class Kill:
    """When a life is to be killed, and who."""

    kind: str
    #: After so many steps of this life at the earliest.
    steps: int
    #: 0 to 1: how far into it.
    delay: float
    victims: tuple[int, ...]

    def await_moment(self, life: Life, course: Course) -> bool:
        """Wait for it; False if the life was over before."""
        if self.kind == "start-up":
            life.until(lambda: life.has_said("training data: "), at_most_s=6 * self.delay)
        elif self.kind == "load":
            life.until(lambda: life.has_said(" model: "))
            life.until(lambda: life.has_loaded, at_most_s=0.15 * self.delay)
        elif self.kind == "save":
            life.until(lambda: life.has_loaded)
            life.until(lambda: life.step >= life.from_step + self.steps)
            life.until(lambda: life.is_saving)
            life.until(lambda: not life.is_saving, at_most_s=0.3 * self.delay)
        else:
            life.until(lambda: life.has_loaded)
            target = life.from_step + self.steps
            if self.kind == "epoch turn":  # the step before the one that has the next epoch's first sample
                later = self.steps // (2 * course.save_every)
                turn = (life.from_step * BATCH // course.epoch + 1 + later) * course.epoch
                target = turn // BATCH
            life.until(lambda: life.step >= target)
            life.until(lambda: life.step > target, at_most_s=0.4 * self.delay)
        return all(rank.poll() is None for rank in life.job.ranks)


@dataclass(frozen=True)
class Death:
    """What a kill did."""

    kill: Kill
    codes: list[int]
    #: The last step that was made before it, by this life; 0: none.
    step: int
    #: The newest whole checkpoint afterwards.
    saved_step: int
    #: Steps that this life had made while a checkpoint was written that never appeared.
    beside_save: int
    seconds: float

    @property
    def recomputed(self) -> int:
        """Steps of this life that the next one makes again."""
        return max(self.step - self.saved_step, 0)


def plan(count: int, seed: int, save_every: int, kinds: tuple[str, ...] = KINDS) -> list[Kill]:
    """So many kills, of each kind equally many, in a random order."""
    rng = random.Random(seed)
    drawn = [kinds[number % len(kinds)] for number in range(count)]
    rng.shuffle(drawn)
    victims = [(0,), (1,), (0, 1)]
    return [Kill(kind, rng.randint(1, 3 * save_every), rng.random(), rng.choice(victims)) for kind in drawn]


def chain(course: Course, run: Path, kills: list[Kill]) -> Iterator[Death]:
    """Kill life after life of one run.

    Raises:
        AssertionError: a life ended otherwise than by its kill, the next one didn't go on from the newest whole
            checkpoint, or has to make more steps again than lie between two checkpoints and beside an unfinished one.
    """
    saved_step = 0
    for kill in kills:
        started = time.monotonic()
        life = course.start(run)
        was_alive = kill.await_moment(life, course)
        finished = life.kill(*kill.victims)
        assert was_alive, f"a life ended before it was killed in {kill.kind}: {finished.codes}\n{finished.output}"
        expected = [-signal.SIGKILL if rank in kill.victims else PEER_LOST for rank in range(2)]
        assert finished.codes == expected, f"{kill}: {finished.codes}\n{finished.output}"
        if life.has_loaded:
            assert life.from_step == saved_step, f"{life.from_step} where {saved_step} was the newest whole checkpoint"
        saved_step = newest_step(run)
        was_saving = any((run / "checkpoints").glob(".part-*/step-*"))
        beside_save = life.step % course.save_every if was_saving else 0
        death = Death(kill, finished.codes, life.step, saved_step, beside_save, time.monotonic() - started)
        assert death.recomputed <= course.save_every + beside_save, f"{death}\n{finished.output}"
        yield death


def newest_step(run: Path) -> int:
    """Of the newest whole checkpoint, as the reader finds it; 0: there is none."""
    try:
        return open_run_or_checkpoint(run).step
    except CheckpointError:
        return 0


def _starts(run: Path) -> list[str]:
    return [line for line in _lines(run / "lives.jsonl") if line.startswith('{"started"')]


def _lines(path: Path) -> list[str]:
    """Whole lines; what a kill or a running write left half is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.split("\n")[:-1]
