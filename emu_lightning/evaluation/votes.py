"""From votes to a win rate with its intervals.

The paper (arXiv 2309.15807) shows a person two pictures and asks two questions. Appeal, prompt hidden: A, B
or Tie; five people. Faithfulness, prompt shown: A, B, Both or Neither, the last two counted as Tie; three
people. Wins, ties and losses add up to one. It does not say how the votes of one prompt become one answer:
the majority rule here, and what happens without one, are our choice.

The unit of every interval is the prompt. Votes on one prompt resemble each other; treated as independent
they give intervals that look 95 % and hold far less often.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Question = Literal["appeal", "faithfulness"]
Answer = Literal["A", "B", "Tie", "Both", "Neither"]
Label = Literal["A", "B", "Tie"]
RaterKind = Literal["person", "model"]
Interval = tuple[float, float]

NUM_DRAWS = 10_000
BOOTSTRAP_SEED = 0
_Z = NormalDist().inv_cdf(0.975)
# A model that compares two scores can only say Tie where a person says Both or Neither.
_ANSWERS: dict[str, tuple[str, ...]] = {"appeal": get_args(Label), "faithfulness": get_args(Answer)}


@dataclass(frozen=True)
class Judgement:
    """One rater's answer to one question about the pictures of one prompt.

    ``answer`` names the model (A or B), never the side of the screen it was shown on. Records are only ever
    appended; where a rater answered the same thing again, the later record counts.
    """

    prompt: str
    question: Question
    answer: Answer
    rater: str
    rater_kind: RaterKind

    def __post_init__(self) -> None:
        if self.question not in _ANSWERS:
            raise ValueError(f"question {self.question!r} is not known: use one of {', '.join(_ANSWERS)}")
        if self.answer not in _ANSWERS[self.question]:
            raise ValueError(
                f"answer {self.answer!r} does not belong to the question {self.question!r}: "
                f"use one of {', '.join(_ANSWERS[self.question])}"
            )
        if self.rater_kind not in get_args(RaterKind):
            raise ValueError(f"rater_kind {self.rater_kind!r} is not known: use person or model")


def append_judgements(path: str | Path, judgements: Iterable[Judgement]) -> None:
    """Appends one JSON line per judgement; several processes may append to one file at a time."""
    lines = "".join(json.dumps(asdict(judgement), ensure_ascii=False) + "\n" for judgement in judgements)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, lines.encode())  # one call: a killed process leaves whole lines
        os.fsync(file)
    finally:
        os.close(file)


def read_judgements(path: str | Path) -> list[Judgement]:
    """Reads the records in the order they were appended.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a judgement; the message names file and line.
    """
    judgements = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            judgements.append(Judgement(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not a judgement ({error}): mend or remove it") from None
    return judgements


def judge_pairs(score_a: ArrayLike, score_b: ArrayLike, margin: float) -> NDArray[np.str_]:
    """Labels each pair A, B or Tie by its two scores.

    Args:
        score_a: (N,) scores of model A, higher is better.
        score_b: (N,) scores of model B for the same prompts at the same seeds.
        margin: at least 0, in the scores' unit; differences up to it are ties.

    Returns:
        (N,) labels.
    """
    a, b = np.asarray(score_a, np.float64), np.asarray(score_b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"scores of A have shape {a.shape}, of B {b.shape}: both must be (N,)")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not a finite number: leave out the pictures that could not be judged")
    if margin < 0:
        raise ValueError(f"margin is {margin}: it must be at least 0")
    difference = b - a
    return np.where(difference > margin, "B", np.where(difference < -margin, "A", "Tie"))


def votes_by_prompt(judgements: Iterable[Judgement], question: Question) -> dict[str, list[Label]]:
    """The votes that count, per prompt: each rater's latest, Both and Neither as Tie.

    Raises:
        ValueError: people's and models' judgements are mixed.
    """
    latest = {(j.prompt, j.rater): j for j in judgements if j.question == question}
    if len({judgement.rater_kind for judgement in latest.values()}) > 1:
        raise ValueError("people's and models' judgements are never pooled: select one rater_kind first")
    votes: dict[str, list[Label]] = {}
    for judgement in latest.values():
        label = "Tie" if judgement.answer in ("Both", "Neither") else judgement.answer
        votes.setdefault(judgement.prompt, []).append(cast(Label, label))
    return votes


@dataclass(frozen=True)
class Majority:
    """One label per prompt, and the prompts on which no answer had more than half of the votes."""

    labels: dict[str, Label]
    no_majority: tuple[str, ...]


def majority_labels(
    judgements: Iterable[Judgement], question: Question, no_majority: Literal["tie", "exclude"] = "tie"
) -> Majority:
    """The answer that more than half of a prompt's raters gave.

    Args:
        judgements: records of one kind of rater; other questions are left aside.
        question: appeal or faithfulness.
        no_majority: what a prompt without a majority (2-2-1) becomes: a tie, or nothing. The paper does not
            say; either way the prompts are named in the result, to be counted or sent to one more rater.
    """
    labels: dict[str, Label] = {}
    undecided = []
    for prompt, votes in votes_by_prompt(judgements, question).items():
        label, count = Counter(votes).most_common(1)[0]
        if 2 * count > len(votes):
            labels[prompt] = label
            continue
        undecided.append(prompt)
        if no_majority == "tie":
            labels[prompt] = "Tie"
    return Majority(labels, tuple(undecided))


@dataclass(frozen=True)
class WinRate:
    """What one model's labels against another's say. Shares are in [0, 1]; intervals are 95 %.

    Attributes:
        win: share of all labels, ties included: the paper's win rate. ``win + tie + lose`` is 1.
        ci95: Wilson's interval of ``win``, on the effective number of labels where prompts repeat.
        win_minus_lose_ci95: from the variance [(W + L) - (W - L)^2] / n, clustered by prompt.
        win_minus_lose_bootstrap95: percentiles of 10,000 resamplings of the prompts, at a fixed seed.
        ties_excluded: W / (W + L), None where every label is a tie.
        sign_test_p: exact two-sided sign test (McNemar's exact) over prompts that are not even.
    """

    win: float
    tie: float
    lose: float
    ci95: Interval
    win_minus_lose: float
    win_minus_lose_ci95: Interval
    win_minus_lose_bootstrap95: Interval
    ties_excluded: float | None
    ties_excluded_ci95: Interval | None
    sign_test_p: float
    num_labels: int
    num_prompts: int

    @property
    def win_rate(self) -> float:
        """The paper's win rate: the share of wins among all labels, ties included."""
        return self.win

    def to_dict(self, headline: Literal["win_rate", "win_minus_lose"]) -> dict[str, Any]:
        """Everything for ``results.json``; ``ci95`` is the interval of the headline figure."""
        return {
            "win_rate": self.win,
            "tie_rate": self.tie,
            "lose_rate": self.lose,
            "win_minus_lose": self.win_minus_lose,
            "ci95": list(self.ci95 if headline == "win_rate" else self.win_minus_lose_ci95),
            "win_rate_ci95": list(self.ci95),
            "win_minus_lose_ci95": list(self.win_minus_lose_ci95),
            "win_minus_lose_bootstrap95": list(self.win_minus_lose_bootstrap95),
            "win_rate_ties_excluded": self.ties_excluded,
            "win_rate_ties_excluded_ci95": self.ties_excluded_ci95 and list(self.ties_excluded_ci95),
            "sign_test_p": self.sign_test_p,
            "num_labels": self.num_labels,
            "num_prompts": self.num_prompts,
        }


def win_rate(
    labels: Sequence[str] | NDArray[np.str_], *, of: Literal["A", "B"], prompts: Sequence[str] | None = None
) -> WinRate:
    """How often model ``of`` wins.

    Args:
        labels: N of A, B, Tie.
        of: the model whose wins are counted.
        prompts: the N prompts the labels belong to, where one prompt has several labels (several seeds, or
            single votes instead of majorities). Without it, every label is a prompt of its own.
    """
    array = np.asarray(labels)
    if array.size == 0:
        raise ValueError("there is no label: a win rate needs at least one judged prompt")
    unknown = set(array.tolist()) - set(get_args(Label))
    if unknown:
        raise ValueError(f"label {sorted(unknown)[0]!r} is not known: use A, B or Tie")
    if prompts is not None and len(prompts) != len(array):
        raise ValueError(f"{len(array)} labels but {len(prompts)} prompts: give one prompt for each label")
    clusters = (
        np.arange(len(array)) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
    )

    signs = np.where(array == "Tie", 0, np.where(array == of, 1, -1))
    decided = signs != 0
    return WinRate(
        win=float(np.mean(signs > 0)),
        tie=float(np.mean(signs == 0)),
        lose=float(np.mean(signs < 0)),
        ci95=_share_ci95(signs > 0, clusters),
        win_minus_lose=float(signs.mean()),
        win_minus_lose_ci95=_difference_ci95(signs, clusters),
        win_minus_lose_bootstrap95=_difference_bootstrap95(signs, clusters),
        ties_excluded=float(np.mean(signs[decided] > 0)) if decided.any() else None,
        ties_excluded_ci95=_share_ci95(signs[decided] > 0, clusters[decided]) if decided.any() else None,
        sign_test_p=_sign_test(np.bincount(clusters, signs)),
        num_labels=len(array),
        num_prompts=int(clusters.max()) + 1,
    )


def win_rates_by(
    slices: Sequence[str],
    labels: Sequence[str] | NDArray[np.str_],
    *,
    of: Literal["A", "B"],
    prompts: Sequence[str] | None = None,
) -> Mapping[str, WinRate]:
    """The win rate within each slice (a subject, a category) by its name; ``slices`` names each label's."""
    names, array = np.asarray(slices), np.asarray(labels)
    if names.shape != array.shape:
        raise ValueError(f"{array.size} labels but {names.size} slices: give one slice for each label")
    texts = None if prompts is None else np.asarray(prompts)
    return {
        str(name): win_rate(
            array[names == name], of=of, prompts=None if texts is None else texts[names == name].tolist()
        )
        for name in np.unique(names)
    }


def wilson_ci95(share: float, num: float) -> Interval:
    """Wilson's score interval (1927, eq. 6 ff.) of a share in [0, 1] among ``num`` independent answers."""
    z2 = _Z**2 / num
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # A share of 0 or 1 is its own bound; rounding must not move it off.
    return (max(0.0, centre - half) if share > 0 else 0.0), (min(1.0, centre + half) if share < 1 else 1.0)


def _variance_of_mean(values: NDArray[Any], clusters: NDArray[np.intp]) -> float:
    """Cluster-robust; with one value per cluster the plain population variance over n."""
    deviations = np.bincount(clusters, values - values.mean())
    return float(deviations @ deviations) / len(values) ** 2


def _share_ci95(hits: NDArray[np.bool_], clusters: NDArray[np.intp]) -> Interval:
    share, num = float(hits.mean()), len(hits)
    independent = share * (1 - share) / num
    if independent > 0:  # Kish's design effect: how much less the labels say than independent ones would
        num_effective = num / max(1.0, _variance_of_mean(hits, clusters) / independent)
    else:
        num_effective = len(np.unique(clusters))
    return wilson_ci95(share, num_effective)


def _difference_ci95(signs: NDArray[np.int_], clusters: NDArray[np.intp]) -> Interval:
    mean, variance = float(signs.mean()), _variance_of_mean(signs, clusters)
    if variance == 0:
        return _unanimous_ci95(signs, clusters)
    half = _Z * math.sqrt(variance)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _difference_bootstrap95(signs: NDArray[np.int_], clusters: NDArray[np.intp]) -> Interval:
    """Prompts with the same sum and count of labels are alike, so counting kinds is resampling prompts."""
    if _variance_of_mean(signs, clusters) == 0:
        return _unanimous_ci95(signs, clusters)
    totals = np.stack([np.bincount(clusters, signs), np.bincount(clusters)], axis=1)
    kinds, counts = np.unique(totals, axis=0, return_counts=True)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    sums = rng.multinomial(counts.sum(), counts / counts.sum(), NUM_DRAWS) @ kinds  # (draws, 2)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _unanimous_ci95(signs: NDArray[np.int_], clusters: NDArray[np.intp]) -> Interval:
    """Where all prompts agree, their spread says nothing; Wilson's ends of wins and of losses do."""
    win, lose = _share_ci95(signs > 0, clusters), _share_ci95(signs < 0, clusters)
    return win[0] - lose[1], win[1] - lose[0]


def _sign_test(net: NDArray[Any]) -> float:
    """``net`` holds each prompt's wins minus losses."""
    wins, losses = int((net > 0).sum()), int((net < 0).sum())
    num, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):  # exact in integers: sum of C(num, k)
        tail += term
        term = term * (num - k) // (k + 1)
    return min(1.0, 2 * tail / 2**num)
