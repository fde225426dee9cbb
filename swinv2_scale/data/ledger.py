"""Which samples of each epoch were read or put into quarantine: proof that none is lost and none comes twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swinv2_scale.data.order import Epoch, Order, Place

#: Columns of a tally: samples that were read, those in quarantine, and of both the sums of their numbers and of the
#: squares of these, modulo 2**64.
NUM_COLUMNS = 4
_MODULUS = 2**64


@dataclass(frozen=True)
class Quarantined:
    """A sample that couldn't be used, and was replaced."""

    shard: str  # its location
    sample: int  # its number in the shard
    key: str  # empty where the shard's bytes are damaged
    cause: str
    position: int
    epoch: int | str


@dataclass(frozen=True)
class EpochAccount:
    """What is known of an epoch that isn't over."""

    source: int
    number: int
    consumed: int = 0
    quarantined: int = 0
    index_sum: int = 0
    square_sum: int = 0
    skipped: int = 0  # left out by a rewind


def tally(places: Iterable[tuple[Place, bool]], epochs: Sequence[Epoch]) -> NDArray[np.int64]:
    """Count samples.

    Args:
        places: where each sample was to be found, and whether it is in quarantine.
        epochs: those that the samples can belong to.

    Returns:
        int64 (epochs, 4), to be summed over micro-batches and ranks; sums wrap around.
    """
    rows = {(epoch.source, epoch.number): row for row, epoch in enumerate(epochs)}
    counts = np.zeros((len(epochs), NUM_COLUMNS), np.uint64)
    for place, is_quarantined in places:
        row = counts[rows[place.source, place.epoch]]
        row[1 if is_quarantined else 0] += np.uint64(1)
        row[2] += np.uint64(place.number)
        row[3] += np.uint64(place.number**2 % _MODULUS)
    return counts.view(np.int64)


@dataclass(frozen=True)
class Ledger:
    """The accounts of the epochs that have begun and aren't over; part of every checkpoint."""

    accounts: tuple[EpochAccount, ...] = ()

    def with_step(self, epochs: Sequence[Epoch], counts: Sequence[Sequence[int]], are_skipped: bool = False) -> Ledger:
        """The tally of one step, or of samples that a rewind leaves out, summed over all ranks, added."""
        known = {(account.source, account.number): account for account in self.accounts}
        for epoch, (consumed, quarantined, index_sum, square_sum) in zip(epochs, counts, strict=True):
            if consumed or quarantined:
                key = (epoch.source, epoch.number)
                old = known.get(key, EpochAccount(*key))
                known[key] = EpochAccount(
                    *key,
                    old.consumed + (0 if are_skipped else consumed),
                    old.quarantined + quarantined,
                    (old.index_sum + index_sum) % _MODULUS,
                    (old.square_sum + square_sum) % _MODULUS,
                    old.skipped + (consumed if are_skipped else 0),
                )
        return Ledger(tuple(known[key] for key in sorted(known)))

    def closed(self, order: Order, position: int) -> tuple[Ledger, list[EpochAccount]]:
        """Check and take out the epochs that are over when everything before ``position`` has been read.

        Raises:
            AssertionError: an epoch has lost a sample or read one twice; that would be a bug of ours.
        """
        still, over = [], []
        for account in self.accounts:
            size = order.sources[account.source].num_samples
            if not order.is_over(Epoch(account.source, account.number, size), position):
                still.append(account)
                continue
            found = (account.consumed + account.quarantined + account.skipped, account.index_sum, account.square_sum)
            # The count, the sum and the sum of squares of 0 .. size-1.
            sums = (size * (size - 1) // 2, (size - 1) * size * (2 * size - 1) // 6)
            wanted = (size, *(value % _MODULUS for value in sums))
            assert found == wanted, f"epoch {account.number} of source {account.source}: {found}, manifest: {wanted}"
            over.append(account)
        return Ledger(tuple(still)), over

    def overdrawn(self, order: Order, share: float) -> EpochAccount | None:
        """An epoch that has more samples in quarantine than this share of its data set."""
        for account in self.accounts:
            if account.quarantined > share * order.sources[account.source].num_samples:
                return account
        return None
