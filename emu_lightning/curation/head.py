"""Learns from people's labels what to look for in embeddings: a head of your own for the CLIP you score by.

A head is one affine map of the embedding. Labels that are true or false are learnt by logistic regression,
numbers by least squares, both with an L2 penalty that cross-validation chooses by the same loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from emu_lightning.files import write_whole

PENALTIES = tuple(10.0**power for power in range(-4, 3))  # per sample, of standardised embeddings
NUM_FOLDS = 5

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FittedHead:
    """An affine map of embeddings, and how it did on pictures that it was not fitted to.

    Attributes:
        weight: (D,), for embeddings as they are stored.
        bias: what is added.
        is_probability: the sum is a logit; else it is the number itself.
        score: over all held-out folds: area under the ROC curve where labels are true or false, else R^2.
        penalty: that was chosen.
    """

    weight: Array
    bias: float
    is_probability: bool
    score: float
    penalty: float

    def __call__(self, embeddings: NDArray[np.floating]) -> Array:
        """(B, D) to (B,), row by row: whichever others are computed with it, a row's answer is the same."""
        sums = (embeddings * self.weight).sum(axis=1) + self.bias
        answers: Array = expit(sums) if self.is_probability else sums
        return answers


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
    held_out = {penalty: np.empty(len(values)) for penalty in PENALTIES}
    for penalty, sums in held_out.items():
        for number in range(NUM_FOLDS):
            weight, bias = fit(x[fold != number], values[fold != number], penalty)
            sums[fold == number] = x[fold == number] @ weight + bias
    error = _squared_error if yes is None else _cross_entropy  # not the AUC, which sees no probabilities
    penalty = min(PENALTIES, key=lambda each: error(held_out[each], values))
    score = _r2(held_out[penalty], values) if yes is None else _auc(held_out[penalty], yes)
    weight, bias = fit(x, values, penalty)
    weight = weight / np.where(deviation > 0, deviation, 1)
    return FittedHead(weight, float(bias - weight @ mean), yes is not None, score, penalty)


def write_head(path: Path, head: FittedHead, clip: str) -> None:
    """Writes a head as safetensors.

    Args:
        path: of the file.
        head: what was learnt.
        clip: fingerprint of the CLIP whose embeddings it was learnt from.
    """
    told = {"is_probability": head.is_probability, "score": head.score, "penalty": head.penalty, "clip": clip}
    tensors = {"weight": head.weight, "bias": np.array([head.bias])}
    write_whole(path, save(tensors, metadata={"head": json.dumps(told)}))


def read_head(path: Path) -> tuple[FittedHead, str]:
    """A head and the fingerprint of its CLIP, as :func:`write_head` wrote them.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: it is no such file.
    """
    with safe_open(path, "numpy") as file:
        told = json.loads((file.metadata() or {})["head"])
        clip = told.pop("clip")
        weight, bias = file.get_tensor("weight"), float(file.get_tensor("bias")[0])
    return FittedHead(weight, bias, **told), clip


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
        loss = _cross_entropy(logits, y) + penalty / 2 * float(weight @ weight)
        return loss, np.append(x.T @ error + penalty * weight, error.sum())

    found = minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def _cross_entropy(logits: Array, y: Array) -> float:
    return float(np.mean(np.logaddexp(0, logits) - y * logits))


def _squared_error(predicted: Array, values: Array) -> float:
    return float(np.mean((values - predicted) ** 2))


def _auc(scores: Array, labels: NDArray[np.bool_]) -> float:
    """How often a true one scores higher than a false one (Mann-Whitney U), equal scores counted half."""
    num_true, num_false = labels.sum(), (~labels).sum()
    ranks = rankdata(scores)[labels].sum()
    return float((ranks - num_true * (num_true + 1) / 2) / (num_true * num_false))


def _r2(predicted: Array, values: Array) -> float:
    return 1 - _squared_error(predicted, values) / float(values.var())
