"""The training loop, the same for every task."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig, patterns_of
from swinv2_scale.data.ledger import EpochAccount, Ledger, Quarantined
from swinv2_scale.data.loader import Batch
from swinv2_scale.data.order import Order
from swinv2_scale.engine.optim import learning_rate
from swinv2_scale.engine.preemption import StopRequest
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.step import StepResult, TrainState, train_step
from swinv2_scale.engine.watchdog import Watchdog
from swinv2_scale.errors import DataError, DivergedError, ExitCode, OutputError, PeerLostError, ScaleError
from swinv2_scale.tasks.base import Task
from swinv2_scale.telemetry.console import ProgressLine, log
from swinv2_scale.telemetry.metrics import peak_memory_bytes


class BetweenSteps(Protocol):
    """What happens besides training. All ranks call each of these together."""

    @property
    def has_validation(self) -> bool: ...

    @property
    def saver(self) -> Saver:
        """Publishes what begin_save() began."""
        ...

    def begin_save(self, state: TrainState, validation_loss: float | None) -> None:
        """Take a snapshot, to be written while training goes on."""
        ...

    def validate(self, step: int) -> float:
        """The validation loss."""
        ...

    def draw_panel(self, step: int) -> None:
        """Write the picture of a step."""
        ...

    def write_row(self, row: dict[str, Any]) -> None:
        """Keep a metrics row; may raise OSError on rank 0."""
        ...

    def list_quarantined(self, lost: list[Quarantined], step: int) -> None:
        """Write down which samples of a step were replaced; may raise OSError on rank 0."""
        ...


@dataclass
class Loop:
    """Steps until the end, a stop signal or an error.

    Args:
        engine: the live DeepSpeed engine.
        order: of the samples that the batches hold.
        batches: this rank's micro-batches from ``state`` on.
        num_micro_batches: how many of them make a step.
        last_step: stop cleanly after this one; the schedule doesn't know about it.
    """

    engine: Any
    task: Task
    config: RunConfig
    state: TrainState
    order: Order
    batches: Iterator[Batch]
    num_micro_batches: int
    between_steps: BetweenSteps
    progress: ProgressLine
    stop_request: StopRequest
    watchdog: Watchdog
    last_step: int
    #: The latest one, by its step.
    validation_losses: dict[int, float] = field(default_factory=dict)

    def run(self) -> ExitCode:
        """
        Raises:
            ScaleError: on every rank the same one.
        """
        try:
            return self._run()
        except PeerLostError:
            raise
        except ScaleError:
            self._finish_saving()  # all ranks are here: what was saved before isn't lost
            raise

    def _run(self) -> ExitCode:
        saved_step = self.state.step
        failure: ScaleError | None = None
        is_steady = False  # the first step starts workers, allocates and compiles
        while self.state.step < self.last_step:
            self.watchdog.enter("waiting for samples", self.state.step + 1, is_steady)
            started = time.perf_counter()
            batches: list[Batch] = []
            if failure is None:
                batches, failure = self._fetch()
            waited = time.perf_counter() - started
            self.watchdog.enter("training", self.state.step + 1, is_steady)
            if self._boundary(failure):
                if self.state.step > saved_step:
                    self._begin_saving()
                self._finish_saving()
                return ExitCode.STOPPED
            lr = learning_rate(self.state.step, self.config.optim)
            result = train_step(self.engine, self.task, batches, lr)
            is_steady = True
            ledger, overdrawn = self._accounted(result)
            self.state = self.state.advanced(self.config.data.global_batch_size, result.is_applied, ledger)
            failure = self._finish_step(result, lr, waited, started, batches)
            self._check_skipped(result)
            self._check_quarantined(overdrawn)
            if self.state.step % self.config.checkpoint.every_steps == 0 or self.state.step == self.last_step:
                dist.all_agree(partial(_raise_if, failure), "writing the metrics")
                self._begin_saving()
                saved_step = self.state.step
        self._finish_saving()
        return ExitCode.DONE

    def _begin_saving(self) -> None:
        self.between_steps.begin_save(self.state, self.validation_losses.get(self.state.step))

    def _finish_saving(self) -> None:
        self.watchdog.enter("writing a checkpoint", self.state.step)
        self.between_steps.saver.finish()

    def _fetch(self) -> tuple[list[Batch], ScaleError | None]:
        """The micro-batches of one step, or this rank's reason why not; told to the others at the boundary."""
        try:
            return [next(self.batches) for _ in range(self.num_micro_batches)], None
        except ScaleError as error:
            return [], error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            message = f"rank {dist.rank()}: a loader worker died: {str(error).splitlines()[0]}"
            return [], DataError(message, "most often memory: lower data.num_workers or data.prefetch_batches")

    def _boundary(self, failure: ScaleError | None) -> bool:
        """The one place of a step where ranks agree on failures and stop signals. True: stop."""
        saver = self.between_steps.saver
        flags = torch.tensor([failure is not None, self.stop_request.is_made, saver.is_busy]).int()
        has_failed, must_stop, num_busy = dist.sum_over_ranks(flags.to(self.engine.device)).tolist()
        if has_failed:
            dist.all_agree(lambda: _raise_if(failure), "training")
        if saver.is_pending and not num_busy:
            saver.advance()
        if must_stop:
            name = self.stop_request.signal.name if self.stop_request.signal else "a signal to another rank"
            log().info("stopping after step %d: %s", self.state.step, name)
        return bool(must_stop)

    def _accounted(self, result: StepResult) -> tuple[Ledger, EpochAccount | None]:
        """The ledger after a step, and an epoch with more in quarantine than is allowed.

        Epochs that are over are checked against the manifest and closed.
        """
        first, samples = self.state.samples_seen, self.config.data.global_batch_size
        ledger = self.state.ledger.with_step(self.order.epochs(first, first + samples), result.tally)
        overdrawn = ledger.overdrawn(self.order, self.config.data.max_quarantined_share)
        ledger, over = ledger.closed(self.order, first + samples)
        for account in over:
            if self.order.sources[account.source].num_samples >= samples:  # else there would be a line a step
                log().info(
                    "epoch %d%s is over: %s samples read + %s in quarantine, as many as the manifest has",
                    account.number,
                    self._of_source(account),
                    f"{account.consumed:,}",
                    f"{account.quarantined:,}",
                )
        return ledger, overdrawn

    def _of_source(self, account: EpochAccount) -> str:
        return f" of {patterns_of(self.config.data.train)[account.source]}" if len(self.order.sources) > 1 else ""

    def _check_quarantined(self, account: EpochAccount | None) -> None:
        if account:
            size = self.order.sources[account.source].num_samples
            raise DataError(
                f"{account.quarantined} of {size:,} training samples{self._of_source(account)} are in quarantine in "
                f"epoch {account.number}, more than data.max_quarantined_share "
                f"{self.config.data.max_quarantined_share:.3%} allows; they are listed in RUN/quarantine.jsonl",
                "swinv2-scale shards verify finds all that are damaged; replace those shards, or allow more",
            ).shared()

    def _check_skipped(self, result: StepResult) -> None:
        if result.is_applied:
            return
        log().warning(
            "step %d: the %s was not finite; the update was skipped, no weight has changed",
            self.state.step,
            "gradient" if result.loss == result.loss and abs(result.loss) != float("inf") else "loss",
        )
        limit = self.config.engine.max_skipped_steps
        if self.state.skipped_in_a_row > limit:
            raise DivergedError(
                f"{self.state.skipped_in_a_row} updates in a row were skipped for a non-finite loss or gradient, the "
                f"last at step {self.state.step} (engine.max_skipped_steps is {limit})",
                "lower optim.lr or optim.clip_grad_norm, or lengthen optim.warmup_steps, and start again from the last "
                "checkpoint; weights in it are finite",
            )

    def _finish_step(
        self, result: StepResult, lr: float, waited: float, started: float, batches: list[Batch]
    ) -> ScaleError | None:
        """Metrics, validation and panel of a step; returns rank 0's failure to write, to be told at the boundary."""
        step, evaluation, logging = self.state.step, self.config.evaluation, self.config.logging
        seconds = time.perf_counter() - started
        rate = self.config.data.global_batch_size / seconds
        row: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "samples_seen": self.state.samples_seen,
            "data_digest": result.data_digest,
            "step_seconds": round(seconds, 6),
            "data_seconds": round(waited, 6),
            "images_per_second": round(rate, 3),
        }
        if not result.is_applied:
            row["skipped"] = True
        lost: list[Quarantined] = []
        if num_lost := sum(quarantined for _, quarantined, *_ in result.tally):
            row["quarantined"] = num_lost
            lost = [sample for mine in dist.gather([q for b in batches for q in b.quarantined]) for sample in mine]
        is_end = step == self.config.optim.total_steps
        if self.between_steps.has_validation and _is_due(step, evaluation.every_steps, is_end):
            row["validation_loss"] = self.between_steps.validate(step)
            self.validation_losses = {step: row["validation_loss"]}
            log().info("step %d: validation loss %.4f", step, row["validation_loss"])
        self.progress.show(step, result.loss, rate, waited / seconds, seconds, peak_memory_bytes(self.engine.device))
        failure: ScaleError | None = None
        try:
            self.between_steps.write_row(row)
            if lost:
                self.between_steps.list_quarantined(lost, step)
        except OSError as error:
            failure = OutputError(f"cannot write the metrics of step {step}: {error}", "free some space")
        if self.between_steps.has_validation and _is_due(step, logging.panel_every_steps, is_end):
            self.between_steps.draw_panel(step)
        return failure


def _is_due(step: int, every: int, is_end: bool) -> bool:
    return is_end or (every > 0 and step % every == 0)


def _raise_if(failure: ScaleError | None) -> None:
    if failure is not None:
        raise failure
