"""The mathematics of probing, compared with loops over samples and with scipy's minimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from swinv2_scale.tasks import probing
from swinv2_scale.tasks.probing import Features, accuracies, choose_penalty, fit_linear, knn_scores


def clouds(seed: int, count: int, num_classes: int = 3, width: int = 5, spread: float = 1.0) -> Features:
    """A cloud of points a class, the same centres for each seed."""
    centres = torch.from_numpy(np.random.default_rng(0).normal(size=(num_classes, width)))
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, num_classes, count))
    return Features(centres[labels] + spread * torch.from_numpy(rng.normal(size=(count, width))), labels)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_neighbours_vote_as_a_loop_over_samples_says(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_SIMILARITIES", 3 * 20)  # several parts, the last one smaller
    train, others = clouds(1, 20), clouds(2, 10)
    found = knn_scores(train, others.values, 3, k, 0.07)
    for query, scores in zip(others.values.numpy(), found.numpy(), strict=True):
        cosines = [
            float(query @ known / np.linalg.norm(query) / np.linalg.norm(known)) for known in train.values.numpy()
        ]
        nearest = sorted(range(20), key=lambda i: -cosines[i])[:k]
        votes = [0.0, 0.0, 0.0]
        for i in nearest:
            votes[int(train.labels[i])] += math.exp(cosines[i] / 0.07)
        # Twenty sums and products in float64.
        np.testing.assert_allclose(scores, np.array(votes) / math.exp(max(cosines) / 0.07), rtol=1e-10)


def test_a_vote_is_finite_at_any_temperature() -> None:
    train = clouds(1, 20)
    scores = knn_scores(Features(train.values.float(), train.labels), train.values.float(), 3, 5, 1e-4)
    assert bool(scores.isfinite().all())
    assert torch.equal(scores.argmax(1), train.labels)  # each is its own nearest neighbour


def test_a_linear_probe_is_the_minimum_that_scipy_finds() -> None:
    train, penalty = clouds(1, 60), 1e-2
    values = train.values.numpy()
    values = (values - values.mean(0)) / values.std(0)
    labels = train.labels.numpy()

    def objective(flat: np.ndarray) -> float:
        weights, bias = flat[:15].reshape(3, 5), flat[15:]
        logits = values @ weights.T + bias
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-logs[np.arange(60), labels].mean() + penalty / 2 * (weights**2).sum())

    wanted = minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    found = fit_linear(train, 3, penalty)
    # scipy's gradient is a difference quotient: its minimum is right to the square root of 1e-8 or so.
    np.testing.assert_allclose(found.weights.numpy(), wanted.x[:15].reshape(3, 5), atol=1e-4)
    assert objective(np.r_[found.weights.numpy().ravel(), found.bias.numpy()]) <= wanted.fun + 1e-9


def test_a_linear_probe_doesnt_depend_on_where_it_starts_nor_on_the_features_scale() -> None:
    train = clouds(1, 60)
    first = fit_linear(train, 3, 1e-2)
    again = fit_linear(train, 3, 1e-2, start=fit_linear(train, 3, 1.0))
    torch.testing.assert_close(again.weights, first.weights, atol=1e-4, rtol=0)  # the gradients' tolerance is 1e-6
    scaled = Features(train.values * 1000 + 7, train.labels)
    other = fit_linear(scaled, 3, 1e-2)
    torch.testing.assert_close(
        other.scores(scaled.values), first.scores(train.values), atol=1e-3, rtol=0
    )  # logits are sums of five products with such weights


def test_features_that_never_change_are_left_out_of_a_probe() -> None:
    train = clouds(1, 60)
    dead = Features(torch.cat((train.values, torch.full((60, 1), 3.0)), 1), train.labels)
    found = fit_linear(dead, 3, 1e-2)
    assert bool(found.scores(dead.values).isfinite().all())
    assert float(found.weights[:, -1].abs().max()) == 0.0


def test_the_penalty_is_chosen_on_samples_that_werent_fitted_and_the_same_every_time() -> None:
    # As many features as samples: without a penalty every training sample is told right, and the others by chance.
    train = clouds(1, 60, width=60, spread=8.0)
    said: list[tuple[float, float]] = []
    chosen = choose_penalty(train, 3, lambda penalty, accuracy: said.append((penalty, accuracy)))
    assert [penalty for penalty, _ in said] == list(probing.PENALTIES)
    best = max(accuracy for _, accuracy in said)
    assert chosen == next(penalty for penalty, accuracy in said if accuracy == best)
    assert any(accuracy < 1 for _, accuracy in said)
    again: list[tuple[float, float]] = []
    choose_penalty(train, 3, lambda penalty, accuracy: again.append((penalty, accuracy)))
    assert again == said


def test_accuracies_count_the_first_and_the_first_five() -> None:
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [0.0, 1, 0, 0, 0, 0]])
    assert accuracies(scores, torch.tensor([0, 4, 5, 1])) == {"top1": 0.5, "top5": 0.75}
    assert accuracies(scores[:, :2], torch.tensor([0, 1, 1, 1])) == {"top1": 0.5, "top5": 1.0}
