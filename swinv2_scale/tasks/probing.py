"""What frozen features know about classes: a vote of the nearest neighbours, and a linear classifier.

Shapes: N training samples, M others, C features, K classes. Everything is computed on the device of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: (N', N) similarities are computed for so many numbers at once.
_SIMILARITIES = 2**26
#: L2 penalties that are tried, strongest first: each fit begins where the one before ended.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
#: One in so many training samples chooses the penalty.
_HELD_OUT_SHARE = 10
_MOST_ITERATIONS = 500


@dataclass(frozen=True)
class Features:
    """Samples as a frozen model sees them.

    Attributes:
        values: float32 (N, C).
        labels: int64 (N,).
    """

    values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, which: Tensor) -> Features:
        return Features(self.values[which], self.labels[which])


def knn_scores(train: Features, values: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The votes of the ``k`` nearest training samples, each with the weight exp(cosine / temperature).

    Args:
        values: (M, C).
        k: at most N.

    Returns:
        (M, K), each row divided by exp(its largest cosine / temperature).
    Source: Instance Discrimination (arXiv 1805.01978) sec. 3.4, which has the vote and 0.07; k = 20 is DINO's
        (arXiv 2104.14294), the best of its 10 to 200.
    """
    assert k <= len(train), f"{k} neighbours of {len(train)} samples"
    known = F.normalize(train.values, dim=1)
    scores = values.new_zeros((len(values), num_classes))
    rows = max(_SIMILARITIES // len(known), 1)
    for part, found in zip(torch.split(values, rows), torch.split(scores, rows), strict=True):
        cosines, neighbours = (F.normalize(part, dim=1) @ known.T).topk(k, dim=1)
        # exp(1 / 0.07) fits, exp(1 / 0.001) wouldn't; a common factor changes no vote.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        found.scatter_add_(1, train.labels[neighbours], weights)
    return scores


@dataclass(frozen=True)
class Linear:
    """A linear classifier of standardised features.

    Attributes:
        mean, std: (C,), of the training samples; a feature that never changes has 1.
        weights: (K, C).
        bias: (K,).
    """

    mean: Tensor
    std: Tensor
    weights: Tensor
    bias: Tensor

    def scores(self, values: Tensor) -> Tensor:
        """(M, C) -> logits (M, K)."""
        return F.linear((values - self.mean) / self.std, self.weights, self.bias)


def fit_linear(train: Features, num_classes: int, penalty: float, start: Linear | None = None) -> Linear:
    """Multinomial logistic regression: the minimum of the mean cross-entropy + penalty / 2 * |weights|^2.

    It is convex: the minimum is one and depends on no random number. The bias has no penalty.

    Args:
        start: of another penalty, to be faster.
    """
    std, mean = torch.std_mean(train.values, dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    values = (train.values - mean) / std
    weights = values.new_zeros((num_classes, values.shape[1])) if start is None else start.weights.clone()
    bias = values.new_zeros(num_classes) if start is None else start.bias.clone()
    parameters = [weights.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(values, weights, bias), train.labels) + penalty / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Linear(mean, std, weights.detach(), bias.detach())


def choose_penalty(train: Features, num_classes: int, note: Callable[[float, float], None]) -> float:
    """The one of PENALTIES with the highest accuracy on a tenth of the training samples, which the others fit; of
    equals the strongest.

    Args:
        note: called with each penalty and its accuracy.
    """
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.labels.device)
    held_out, fitted = (shuffled[: len(train) // _HELD_OUT_SHARE], shuffled[len(train) // _HELD_OUT_SHARE :])
    best, best_accuracy = PENALTIES[0], -1.0
    linear: Linear | None = None
    for penalty in PENALTIES:
        linear = fit_linear(train.at(fitted), num_classes, penalty, linear)
        accuracy = accuracies(linear.scores(train.values[held_out]), train.labels[held_out])["top1"]
        note(penalty, accuracy)
        if accuracy > best_accuracy:
            best, best_accuracy = penalty, accuracy
    return best


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of samples whose label is the first, or among the first five, by score.

    Args:
        scores: (M, K), M at least 1.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": float(best[:, 0].double().mean()), "top5": float(best.any(1).double().mean())}
