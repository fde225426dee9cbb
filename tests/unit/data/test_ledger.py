"""No sample of an epoch is lost or read twice, and a ledger that is wrong says so."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.data.ledger import EpochAccount, Ledger, tally
from swinv2_scale.data.order import Order

ORDER = Order.of((4, 7, 5, 6), 1, True, 2, (2, 2), (2.0, 3.0))
SINGLE = Order.of((4, 7, 5), 1, True, 2)


def after(order: Order, batch: int, steps: int, lost: frozenset[int] = frozenset(), skip: int | None = None) -> Ledger:
    """The ledger after some steps.

    Args:
        lost: numbers in their sources of samples that are in quarantine.
        skip: a position that a bug reads as the next one.
    """
    ledger = Ledger()
    for step in range(steps):
        first, end = step * batch, (step + 1) * batch
        epochs = order.epochs(first, end)
        places = [order.locate(position + (position == skip)) for position in range(first, end)]
        counts = tally(((place, place.number in lost) for place in places), epochs)
        ledger, _ = ledger.with_step(epochs, counts.tolist()).closed(order, end)
    return ledger


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([ORDER, SINGLE]), st.integers(1, 11), st.integers(1, 30), st.frozensets(st.integers(0, 10)))
def test_any_batch_size_closes_every_epoch_exactly(order: Order, batch: int, steps: int, lost: frozenset[int]) -> None:
    ledger = after(order, batch, steps, lost)
    position = batch * steps
    seen: dict[tuple[int, int], list[int]] = {}
    for place in map(order.locate, range(position)):
        seen.setdefault((place.source, place.epoch), []).append(place.number)
    still = {(account.source, account.number): account for account in ledger.accounts}
    for (source, epoch), indexes in seen.items():
        account = still.get((source, epoch))
        if account:
            quarantined = sum(index in lost for index in indexes)
            assert (account.consumed, account.quarantined) == (len(indexes) - quarantined, quarantined)
            assert account.index_sum == sum(indexes)
        else:
            assert sorted(indexes) == list(range(order.sources[source].num_samples))


def test_a_sample_read_instead_of_another_is_found_at_the_epochs_end() -> None:
    with pytest.raises(AssertionError, match=r"epoch 0 of source 0: \(16, "):
        after(SINGLE, 4, 4, skip=6)


def test_a_step_that_was_not_counted_is_found() -> None:
    ledger = after(SINGLE, 4, 3)
    with pytest.raises(AssertionError, match="epoch 0"):
        ledger.closed(SINGLE, 16)


def test_a_closed_epoch_tells_how_many_were_read_and_how_many_lost() -> None:
    ledger = after(SINGLE, 4, 3, frozenset({0, 9}))
    places = [(SINGLE.locate(position), SINGLE.locate(position).number in {0, 9}) for position in range(12, 16)]
    epochs = SINGLE.epochs(12, 16)
    rest, over = ledger.with_step(epochs, tally(places, epochs).tolist()).closed(SINGLE, 16)
    assert [(account.number, account.consumed, account.quarantined) for account in over] == [(0, 14, 2)]
    assert rest == Ledger()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([ORDER, SINGLE]), st.integers(1, 11), st.integers(0, 5), st.integers(1, 9))
def test_samples_left_out_by_a_rewind_are_counted_and_epochs_close_exactly(
    order: Order, batch: int, saved: int, skipped: int
) -> None:
    ledger = after(order, batch, saved)
    before = {(a.source, a.number): a for a in ledger.accounts}
    first, end = saved * batch, (saved + skipped) * batch
    epochs = order.epochs(first, end)
    # As two ranks count them, and their sums wrap.
    counts = sum(tally(((order.locate(p), False) for p in range(first + rank, end, 2)), epochs) for rank in (0, 1))
    assert not isinstance(counts, int)
    ledger, over = ledger.with_step(epochs, counts.tolist(), are_skipped=True).closed(order, end)
    places = [order.locate(position) for position in range(first, end)]
    for account in [*ledger.accounts, *over]:
        key = (account.source, account.number)
        assert account.skipped == sum((place.source, place.epoch) == key for place in places)
        assert account.consumed == (before[key].consumed if key in before else 0)


def test_sums_beyond_64_bits_wrap_alike_on_both_sides() -> None:
    huge = Order.of((5_000_000_000,), 0, False, 1)
    size = huge.num_samples
    total, squares = size * (size - 1) // 2, (size - 1) * size * (2 * size - 1) // 6
    assert squares > 2**64
    account = EpochAccount(0, 0, size - 1, 1, total % 2**64, squares % 2**64)
    _, over = Ledger((account,)).closed(huge, size)
    assert over == [account]
    with pytest.raises(AssertionError):
        Ledger((replace(account, square_sum=account.square_sum - 1),)).closed(huge, size)
    place = huge.locate(size - 1)
    (row,) = tally([(place, False)], huge.epochs(size - 1, size)).tolist()
    assert row[3] % 2**64 == (size - 1) ** 2 % 2**64


def test_an_epoch_over_its_budget_is_named() -> None:
    ledger = after(SINGLE, 5, 3, frozenset({1, 2, 3}))
    quarantined = ledger.accounts[0].quarantined
    assert ledger.overdrawn(SINGLE, quarantined / 16) is None
    assert ledger.overdrawn(SINGLE, (quarantined - 0.5) / 16) == ledger.accounts[0]


def test_a_ledger_survives_json() -> None:
    ledger = after(ORDER, 3, 5)
    assert Ledger(tuple(EpochAccount(**account) for account in asdict(ledger)["accounts"])) == ledger
