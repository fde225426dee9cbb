"""The account of every epoch while a training goes on: what is told at its end, what is too much quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swinv2_scale import dist
from swinv2_scale.config.run import RunConfig, patterns_of
from swinv2_scale.data.ledger import EpochAccount, Ledger, tally
from swinv2_scale.data.order import Order
from swinv2_scale.errors import DataError
from swinv2_scale.telemetry.console import log


@dataclass(frozen=True)
class Accounting:
    """Ledgers of one run.

    Args:
        order: of its training samples.
    """

    config: RunConfig
    order: Order

    def after_step(
        self, ledger: Ledger, first: int, counts: Sequence[Sequence[int]]
    ) -> tuple[Ledger, EpochAccount | None]:
        """The ledger after a step, and an epoch with more in quarantine than is allowed.

        Args:
            first: the step's first position.
            counts: its tally, summed over all ranks.
        """
        end = first + self.config.data.global_batch_size
        ledger = ledger.with_step(self.order.epochs(first, end), counts)
        overdrawn = ledger.overdrawn(self.order, self.config.data.max_quarantined_share)
        return self._closed(ledger, end), overdrawn

    def epochs(self, first: int) -> list[tuple[int, int]]:
        """(source, number) of the epochs that the samples of a step can belong to."""
        epochs = self.order.epochs(first, first + self.config.data.global_batch_size)
        return [(epoch.source, epoch.number) for epoch in epochs]

    def after_skipping(self, ledger: Ledger, first: int, end: int) -> Ledger:
        """The ledger where the samples of positions ``first .. end-1`` are left out; called by all ranks."""
        epochs = self.order.epochs(first, end)
        mine = range(first + dist.rank(), end, dist.world_size())
        counts = torch.from_numpy(tally(((self.order.locate(position), False) for position in mine), epochs))
        total = dist.sum_over_ranks(counts.to(dist.device())).tolist()
        return self._closed(ledger.with_step(epochs, total, are_skipped=True), end)

    def check_quarantined(self, account: EpochAccount | None) -> None:
        """
        Raises:
            DataError: on every rank: this epoch has too much in quarantine.
        """
        if account:
            size = self.order.sources[account.source].num_samples
            error = DataError(
                f"{account.quarantined} of {size:,} training samples{self._of_source(account)} are in quarantine in "
                f"epoch {account.number}, more than data.max_quarantined_share "
                f"{self.config.data.max_quarantined_share:.3%} allows; they are listed in RUN/quarantine.jsonl",
                "swinv2-scale shards verify finds all that are damaged; replace those shards, or allow more",
            )
            error.is_shared = True
            raise error

    def _closed(self, ledger: Ledger, position: int) -> Ledger:
        """Epochs that are over are checked against the manifest and closed."""
        ledger, over = ledger.closed(self.order, position)
        for account in over:
            # Else there would be a line a step.
            if self.order.sources[account.source].num_samples >= self.config.data.global_batch_size:
                log().info(
                    "epoch %d%s is over: %s samples read + %s in quarantine%s, as many as the manifest has",
                    account.number,
                    self._of_source(account),
                    f"{account.consumed:,}",
                    f"{account.quarantined:,}",
                    f" + {account.skipped:,} skipped" if account.skipped else "",
                )
        return ledger

    def _of_source(self, account: EpochAccount) -> str:
        return f" of {patterns_of(self.config.data.train)[account.source]}" if len(self.order.sources) > 1 else ""
