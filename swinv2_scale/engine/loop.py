"""The training loop, the same for every task."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig
from swinv2_scale.data.ledger import EpochAccount, Quarantined
from swinv2_scale.data.loader import Batch
from swinv2_scale.engine.accounting import Accounting
from swinv2_scale.engine.amplitudes import AmplitudeMeter
from swinv2_scale.engine.anomalies import Report, action_after, micro_batches_of
from swinv2_scale.engine.evaluate import Validation
from swinv2_scale.engine.optim import learning_rate
from swinv2_scale.engine.preemption import StopRequest
from swinv2_scale.engine.saving import Saver
from swinv2_scale.engine.step import StepResult, TrainState, train_step
from swinv2_scale.engine.watchdog import Watchdog
from swinv2_scale.errors import DataError, ExitCode, OutputError, PeerLostError, ScaleError
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

    def begin_save(self, state: TrainState, validation: Validation | None) -> None:
        """Take a snapshot, to be written while training goes on."""
        ...

    def rewind(self) -> TrainState:
        """Put the last checkpoint, or the run's first values, into the live engine; forget the metrics after it."""
        ...

    def validate(self, step: int, with_picture: bool) -> Validation:
        """Metrics on the validation samples; with a picture of them, if the task has one."""
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

    def write_anomaly(self, row: dict[str, Any]) -> None:
        """Keep a row about something unusual; may raise OSError on rank 0."""
        ...


@dataclass
class Loop:
    """Steps until the end, a stop signal or an error.

    Args:
        engine: the live DeepSpeed engine.
        accounting: of the samples that the batches hold.
        open_batches: this rank's micro-batches from a state on.
        num_micro_batches: how many of them make a step.
        last_step: stop cleanly after this one; the schedule doesn't know about it.
    """

    engine: Any
    task: Task
    config: RunConfig
    state: TrainState
    accounting: Accounting
    open_batches: Callable[[TrainState], Generator[Batch]]
    num_micro_batches: int
    between_steps: BetweenSteps
    progress: ProgressLine
    stop_request: StopRequest
    watchdog: Watchdog
    last_step: int
    amplitudes: AmplitudeMeter
    #: Of the step that the state is at.
    validation: Validation | None = None
    _batches: Generator[Batch] = field(init=False)

    def run(self) -> ExitCode:
        """
        Raises:
            ScaleError: on every rank the same one.
        """
        self._batches = self.open_batches(self.state)
        try:
            return self._run()
        except PeerLostError:
            raise
        except ScaleError:
            self._finish_saving()  # all ranks are here: what was saved before isn't lost
            raise
        finally:
            self._batches.close()

    def _run(self) -> ExitCode:
        saved_step, is_save_due = self.state.step, False
        failure: ScaleError | None = None
        is_steady = False  # the first step starts workers, allocates and compiles
        while not self._is_over:
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
            self.amplitudes.clear()
            result = train_step(self.engine, self.task, batches, lr, self._may_step)
            is_steady = True
            overdrawn, report = self._advance(result, batches)
            failure = self._finish_step(result, lr, waited, started, batches, report)
            self.accounting.check_quarantined(overdrawn)
            if report and report.action == "stop":
                raise report.error(self.config.anomalies, self.state.rewinds)
            if report and report.action == "rewind":
                dist.all_agree(partial(_raise_if, failure), "writing the metrics")
                self._rewind()
                saved_step, is_save_due, is_steady = self.state.step, False, False
                continue
            is_save_due |= self.state.step % self.config.checkpoint.every_steps == 0
            # While updates are being refused the weights may be what is wrong: a rewind must not lead to them.
            if (is_save_due and not self.state.skipped_in_a_row) or self._is_over:
                dist.all_agree(partial(_raise_if, failure), "writing the metrics")
                self._begin_saving()
                saved_step, is_save_due = self.state.step, False
        self._finish_saving()
        return ExitCode.DONE

    @property
    def _is_over(self) -> bool:
        return self.state.step >= self.last_step or self.state.is_over(self.config)

    def _begin_saving(self) -> None:
        self.between_steps.begin_save(self.state, self.validation)

    def _finish_saving(self) -> None:
        self.watchdog.enter("writing a checkpoint", self.state.step)
        self.between_steps.saver.finish()

    def _fetch(self) -> tuple[list[Batch], ScaleError | None]:
        """The micro-batches of one step, or this rank's reason why not; told to the others at the boundary."""
        try:
            return [next(self._batches) for _ in range(self.num_micro_batches)], None
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
            reasons = enumerate(dist.gather(self.stop_request.reason))
            self.stop_request.reason = next(f"{why} (rank {rank})" if rank else why for rank, why in reasons if why)
            log().info("stopping after step %d: %s", self.state.step, self.stop_request.reason)
        return bool(must_stop)

    def _may_step(self, loss: float, grad_norm: float) -> bool:
        anomaly = self.state.usual.find(loss, grad_norm, self.config.anomalies)
        return anomaly is None or not anomaly.is_refused(self.config.anomalies)

    def _advance(self, result: StepResult, batches: list[Batch]) -> tuple[EpochAccount | None, Report | None]:
        """Take a step into the state; returns an epoch with too much in quarantine, and what was unusual."""
        config, before = self.config.anomalies, self.state
        first, samples = before.samples_seen, self.config.data.global_batch_size
        ledger, overdrawn = self.accounting.after_step(before.ledger, first, result.tally)
        usual, anomaly = before.usual, before.usual.find(result.loss, result.grad_norm, config)
        if result.is_applied:
            usual = usual.with_update(result.loss, result.grad_norm, config)
        self.state, self.validation = before.advanced(samples, result.is_applied, ledger, usual), None
        if anomaly is None:
            return overdrawn, None
        own = (result.micro_losses.tolist(), [batch.keys for batch in batches])
        return overdrawn, Report(
            anomaly=anomaly,
            action=action_after(anomaly, self.state.skipped_in_a_row, before.rewinds, config),
            step=self.state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            refused_in_a_row=self.state.skipped_in_a_row,
            samples_seen=self.state.samples_seen,
            positions=range(first, first + samples),
            epochs=self.accounting.epochs(first),
            micro_batches=micro_batches_of(dist.gather(own)),
            amplitudes=self.amplitudes.read(),
        )

    def _rewind(self) -> None:
        """Back to the last checkpoint, and on behind the update that led here: the samples between are left out.

        Nothing of this is written down for a next life: one that starts from the same checkpoint comes to the same
        verdicts at the same steps, and so to the same rewind.
        """
        self._finish_saving()  # the last one begun is the one to go back to
        bad = self.state
        self._batches.close()
        saved = self.between_steps.rewind()
        first, end = saved.samples_seen, bad.samples_seen
        ledger = self.accounting.after_skipping(saved.ledger, first, end)
        self.state = replace(saved, samples_seen=end, skipped_in_a_row=0, rewinds=bad.rewinds + 1, ledger=ledger)
        row = {"step": saved.step, "kind": "rewind", "from_step": bad.step, "to_step": saved.step}
        row |= {"skipped_positions": [first, end], "rewinds": self.state.rewinds, "samples_seen": end}
        dist.all_agree(lambda: self.between_steps.write_anomaly(row), "writing the anomalies")
        log().warning(
            "went back from step %d to step %d (rewind %d of %d); the %s samples between are left out, step %d goes on "
            "with the next ones",
            *(bad.step, saved.step, self.state.rewinds, self.config.anomalies.max_rewinds),
            *(f"{end - first:,}", saved.step + 1),
        )
        self._batches = self.open_batches(self.state)

    def _finish_step(
        self,
        result: StepResult,
        lr: float,
        waited: float,
        started: float,
        batches: list[Batch],
        report: Report | None,
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
        if report:
            row["anomaly"] = report.anomaly.kind
            log().warning("%s", report.text(self.config.anomalies))
            log().warning("step %d: largest outputs: %s", step, report.amplitudes)
        if logging.amplitudes_every_steps and step % logging.amplitudes_every_steps == 0:
            row["amplitudes"] = self.amplitudes.read().largest
        lost: list[Quarantined] = []
        if num_lost := sum(quarantined for _, quarantined, *_ in result.tally):
            row["quarantined"] = num_lost
            lost = [sample for mine in dist.gather([q for b in batches for q in b.quarantined]) for sample in mine]
        is_end = step == self.config.optim.total_steps
        has_validation = self.between_steps.has_validation
        if has_validation and _is_due(step, evaluation.every_steps, is_end):
            found = self.between_steps.validate(step, _is_due(step, logging.panel_every_steps, is_end))
            self.validation, self.state = found, self.state.validated(found.score)
            row |= {f"validation_{name}": value for name, value in found.metrics.items()}
            log().info("step %d: validation %s", step, found)
        self.progress.show(step, result.loss, rate, waited / seconds, seconds, peak_memory_bytes(self.engine.device))
        failure: ScaleError | None = None
        try:
            self.between_steps.write_row(row)
            if lost:
                self.between_steps.list_quarantined(lost, step)
            if report:
                self.between_steps.write_anomaly(report.row())
        except OSError as error:
            failure = OutputError(f"cannot write the metrics of step {step}: {error}", "free some space")
        if has_validation and _is_due(step, logging.panel_every_steps, self.state.is_over(self.config)):
            self.between_steps.draw_panel(step)
        return failure


def _is_due(step: int, every: int, is_end: bool) -> bool:
    return is_end or (every > 0 and step % every == 0)


def _raise_if(failure: ScaleError | None) -> None:
    if failure is not None:
        raise failure
