"""Strengths of three or more models from paired comparisons with ties.

Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments" (1970):
with strengths pi and the prevalence of ties nu, P(i wins), P(j wins) and P(tie) are as pi_i, pi_j and
nu * sqrt(pi_i * pi_j). A tie counted as half a win each would shrink the differences where ties are frequent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from emu_lightning.evaluation.votes import Interval, Label, resample

# A normal prior of variance 100 on every log strength and on log nu. Without it, 50 wins to 0 have no finite
# estimate; with it, their difference is 7.7. Where both sides win it is not felt.
RIDGE = 0.01


class Comparison(NamedTuple):
    """The label (A: model ``a`` wins, B: model ``b`` wins, Tie) of two models' pictures of one prompt."""

    prompt: str
    a: str
    b: str
    label: Label


class Difference(NamedTuple):
    """How much stronger, in log strength, a model is than another, with its 95 % interval."""

    value: float
    ci95: Interval


@dataclass(frozen=True)
class Davidson:
    """The fitted model.

    Attributes:
        strengths: log strength of each model, strongest first; their mean is zero.
        nu: prevalence of ties, above 0; two equal models tie with probability nu / (2 + nu).
        differences: by (stronger, weaker), for all pairs, compared or not.
    """

    strengths: dict[str, float]
    nu: float
    differences: dict[tuple[str, str], Difference]
    num_comparisons: int
    num_prompts: int

    @property
    def told_apart(self) -> tuple[tuple[str, str], ...]:
        """The order: the pairs (stronger, weaker) whose interval of the difference leaves out 0."""
        return tuple(pair for pair, difference in self.differences.items() if difference.ci95[0] > 0)

    def probabilities(self, a: str, b: str) -> tuple[float, float, float]:
        """Win, tie and loss of model ``a`` against ``b``."""
        half = (self.strengths[a] - self.strengths[b]) / 2
        total = math.exp(half) + self.nu + math.exp(-half)
        return math.exp(half) / total, self.nu / total, math.exp(-half) / total

    def to_dict(self) -> dict[str, Any]:
        """Everything for ``results.json``."""
        return {
            "log_strengths": self.strengths,
            "nu": self.nu,
            "differences": [
                {"stronger": stronger, "weaker": weaker, "value": value, "ci95": list(ci95)}
                for (stronger, weaker), (value, ci95) in self.differences.items()
            ],
            "told_apart": [list(pair) for pair in self.told_apart],
            "num_comparisons": self.num_comparisons,
            "num_prompts": self.num_prompts,
        }


def fit_davidson(comparisons: Iterable[Comparison]) -> Davidson:
    """Fits by penalised maximum likelihood; the intervals are percentiles of a bootstrap over prompts.

    Each compared pair lends the bootstrap two prompts, one won by either side, so that prompts that all agree
    still leave doubt.

    Args:
        comparisons: majorities or single votes of any pairs of the models.

    Raises:
        ValueError: no comparison, an unknown label, a model against itself, or models that no chain of
            comparisons links.
    """
    rows = list(comparisons)
    names = sorted({name for row in rows for name in (row.a, row.b)})
    _check(rows, names)
    index = {name: i for i, name in enumerate(names)}
    pairs = sorted({tuple(sorted((index[row.a], index[row.b]))) for row in rows})
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}

    # All the likelihood needs of a prompt: each model's wins and half its ties, the ties, each pair's count.
    totals = np.zeros((len(prompts), len(names) + 1 + len(pairs)))
    for prompt, a, b, label in rows:
        of_prompt, i, j = totals[prompts[prompt]], index[a], index[b]
        of_prompt[i] += {"A": 1, "Tie": 0.5, "B": 0}[label]
        of_prompt[j] += {"A": 0, "Tie": 0.5, "B": 1}[label]
        of_prompt[len(names)] += label == "Tie"
        of_prompt[len(names) + 1 + pairs.index((min(i, j), max(i, j)))] += 1

    # How the logits of a win, a loss and a tie hang on the parameters.
    effects = np.zeros((len(pairs), 3, len(names) + 1))
    for effect, (i, j) in zip(effects, pairs, strict=True):
        effect[0, i] = effect[1, j] = effect[2, -1] = 1
        effect[2, i] = effect[2, j] = 0.5
    *strengths, log_nu = _fit(totals.sum(axis=0)[None], effects)[0].tolist()

    counts = totals[:, len(names) + 1 :]
    weights = counts.sum(axis=0) / (counts > 0).sum(axis=0)  # comparisons of the pair on a prompt that has it
    lent = np.zeros((len(pairs), 2, totals.shape[1]))
    lent[:, :, : len(names) + 1] = effects[:, :2]
    lent[:, :, len(names) + 1 :] = np.eye(len(pairs))[:, None]
    lent *= weights[:, None, None]
    draws = _fit(resample(np.concatenate([totals, lent.reshape(-1, totals.shape[1])])), effects)

    order = sorted(range(len(names)), key=lambda i: -strengths[i])
    differences = {}
    for i, j in combinations(order, 2):
        low, high = np.percentile(draws[:, i] - draws[:, j], [2.5, 97.5])
        differences[names[i], names[j]] = Difference(strengths[i] - strengths[j], (float(low), float(high)))
    return Davidson(
        strengths={names[i]: strengths[i] for i in order},
        nu=math.exp(log_nu),
        differences=differences,
        num_comparisons=len(rows),
        num_prompts=len(prompts),
    )


def _fit(totals: NDArray[Any], effects: NDArray[Any]) -> NDArray[Any]:
    """Damped Newton for many sets of totals at once: (B, D) to the (B, K + 1) log strengths and log nu.

    The mean of the log strengths stays zero: only the ridge speaks of it.
    """
    size = effects.shape[-1]
    observed, counts = totals[:, :size], totals[:, size:]
    parameters = np.zeros_like(observed)
    while True:
        logits = np.einsum("pok,bk->bpo", effects, parameters)
        chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chances *= counts[..., None] / chances.sum(axis=-1, keepdims=True)  # expected wins, losses, ties
        means = np.einsum("bpo,pok->bpk", chances, effects)
        gradient = observed - means.sum(axis=1) - RIDGE * parameters
        curvature = np.einsum("bpo,pok,pol->bkl", chances, effects, effects, optimize=True)
        curvature -= np.einsum("bpk,bpl,bp->bkl", means, means, 1 / np.maximum(counts, 1), optimize=True)
        step = np.linalg.solve(curvature + RIDGE * np.eye(size), gradient[..., None])[..., 0]
        # A step changes no logit against another by more than twice its largest entry; damped by that, Newton
        # ascends from anywhere (Sun and Tran-Dinh 2019, generalised self-concordance of order 2).
        reach = 2 * np.abs(step).max(axis=1, keepdims=True) + 1e-12
        parameters += step * np.log1p(reach) / reach
        if reach.max() < 1e-6:
            return parameters


def _check(rows: list[Comparison], names: list[str]) -> None:
    if not rows:
        raise ValueError("there is no comparison: strengths need at least one")
    component = {name: frozenset([name]) for name in names}
    for prompt, a, b, label in rows:
        if label not in get_args(Label):
            raise ValueError(f"label {label!r} of prompt {prompt!r} is not known: use A, B or Tie")
        if a == b:
            raise ValueError(f"prompt {prompt!r} compares {a!r} with itself: name two models")
        joined = component[a] | component[b]
        component.update(dict.fromkeys(joined, joined))
    components = sorted(", ".join(sorted(members)) for members in set(component.values()))
    if len(components) > 1:
        raise ValueError(
            f"no comparison links {' with '.join(f'({members})' for members in components)}: "
            "compare a model of one group with a model of the other"
        )
