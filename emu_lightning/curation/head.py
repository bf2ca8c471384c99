"""Learns from people's labels what to look for in embeddings: a head of your own for the CLIP you score by.

A head is one affine map of the embedding. Labels that are true or false are learnt by logistic regression,
numbers by least squares, both with an L2 penalty that cross-validation chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

PENALTIES = tuple(10.0**power for power in range(-4, 3))  # per sample, of standardised embeddings
NUM_FOLDS = 5

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FittedHead:
    """An affine map of embeddings, and how it did on pictures that it was not fitted to.

    Attributes:
        weight: (D,), for embeddings as they are stored.
        bias: what is added.
        score: over all held-out folds: area under the ROC curve where labels are true or false, else R^2.
        penalty: that was chosen.
    """

    weight: Array
    bias: float
    score: float
    penalty: float


def fit_head(embeddings: Array, labels: Array | NDArray[np.bool_], seed: int = 0) -> FittedHead:
    """Fits a head.

    Args:
        embeddings: (N, D).
        labels: (N,) bool, or numbers.
        seed: of the folds.

    Raises:
        ValueError: there are too few labels, or only one kind of them.
    """
    yes = labels.astype(bool) if labels.dtype == bool else None
    counts = np.unique(labels, return_counts=True)[1]
    if len(labels) < 2 * NUM_FOLDS or len(counts) < 2 or (yes is not None and counts.min() < NUM_FOLDS):
        raise ValueError(
            f"{len(labels)} labels with {len(counts)} values are too few to learn from: give at least "
            f"{2 * NUM_FOLDS}, and {NUM_FOLDS} of each kind"
        )
    values = labels.astype(np.float64)
    mean, deviation = embeddings.mean(0), embeddings.std(0)
    x = (embeddings - mean) / np.where(deviation > 0, deviation, 1)
    fold = _folds(yes, len(labels), seed)
    fit = _ridge if yes is None else _logistic
    scores = {}
    for penalty in PENALTIES:
        held_out = np.empty(len(values))
        for number in range(NUM_FOLDS):
            weight, bias = fit(x[fold != number], values[fold != number], penalty)
            held_out[fold == number] = x[fold == number] @ weight + bias
        scores[penalty] = _r2(held_out, values) if yes is None else _auc(held_out, yes)
    penalty = max(scores, key=lambda each: scores[each])
    weight, bias = fit(x, values, penalty)
    weight = weight / np.where(deviation > 0, deviation, 1)
    return FittedHead(weight, float(bias - weight @ mean), scores[penalty], penalty)


def _folds(labels: NDArray[np.bool_] | None, num: int, seed: int) -> NDArray[np.int64]:
    """(N,) the fold of each sample; of each kind of label every fold gets as many as the others."""
    order = np.random.default_rng(seed).permutation(num)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(num, np.int64)
    fold[order] = np.arange(num) % NUM_FOLDS
    return fold


def _ridge(x: Array, y: Array, penalty: float) -> tuple[Array, float]:
    """argmin |x w + b - y|^2 + N penalty |w|^2; b is not penalised."""
    mean, centre = x.mean(0), y.mean()
    gram = (x - mean).T @ (x - mean) + len(x) * penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, (x - mean).T @ (y - centre))
    return weight, float(centre - mean @ weight)


def _logistic(x: Array, y: Array, penalty: float) -> tuple[Array, float]:
    """argmin of the mean cross-entropy + penalty / 2 |w|^2; b is not penalised."""

    def objective(parameters: Array) -> tuple[float, Array]:
        weight, logits = parameters[:-1], x @ parameters[:-1] + parameters[-1]
        error = (expit(logits) - y) / len(y)
        loss = np.mean(np.logaddexp(0, logits) - y * logits) + penalty / 2 * weight @ weight
        return loss, np.append(x.T @ error + penalty * weight, error.sum())

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def _auc(scores: Array, labels: NDArray[np.bool_]) -> float:
    """How often a true one scores higher than a false one (Mann-Whitney U), equal scores counted half."""
    num_true, num_false = labels.sum(), (~labels).sum()
    ranks = rankdata(scores)[labels].sum()
    return float((ranks - num_true * (num_true + 1) / 2) / (num_true * num_false))


def _r2(predicted: Array, values: Array) -> float:
    return float(1 - ((values - predicted) ** 2).sum() / ((values - values.mean()) ** 2).sum())
