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
NoMajority = Literal["tie", "exclude", "extra_rater"]
Interval = tuple[float, float]

NUM_DRAWS = 10_000
BOOTSTRAP_SEED = 0
_Z = NormalDist().inv_cdf(0.975)
# A model that compares two scores can only say Tie where a person says Both or Neither.
_ANSWERS: dict[str, tuple[str, ...]] = {"appeal": get_args(Label), "faithfulness": get_args(Answer)}


@dataclass(frozen=True)
class Judgement:
    """One rater's answer to one question about the pictures of one prompt.

    ``answer`` names the model (A or B), never the side of the screen it was shown on; ``left``
    names the model shown on the left, where known. Records are only ever appended; where a rater answered the
    same thing again, the later record counts.
    """

    prompt: str
    question: Question
    answer: Answer
    rater: str
    rater_kind: RaterKind
    left: Literal["A", "B"] | None = None

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
        if self.left not in ("A", "B", None):
            raise ValueError(f"left is {self.left!r}: it names the model shown on the left, A or B, or null")


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


def latest_votes(judgements: Iterable[Judgement], question: Question) -> dict[tuple[str, str], Label]:
    """The votes that count, by (prompt, rater): each rater's latest, Both and Neither as Tie.

    Raises:
        ValueError: people's and models' judgements are mixed.
    """
    return {
        key: cast(Label, "Tie" if judgement.answer in ("Both", "Neither") else judgement.answer)
        for key, judgement in _latest(judgements, question).items()
    }


def _latest(judgements: Iterable[Judgement], question: Question) -> dict[tuple[str, str], Judgement]:
    latest = {(j.prompt, j.rater): j for j in judgements if j.question == question}
    if len({judgement.rater_kind for judgement in latest.values()}) > 1:
        raise ValueError("people's and models' judgements are never pooled: select one rater_kind first")
    return latest


def votes_by_prompt(judgements: Iterable[Judgement], question: Question) -> dict[str, list[Label]]:
    """The labels of ``latest_votes``, per prompt."""
    votes: dict[str, list[Label]] = {}
    for (prompt, _), label in latest_votes(judgements, question).items():
        votes.setdefault(prompt, []).append(label)
    return votes


@dataclass(frozen=True)
class Majority:
    """One label per prompt, and the prompts on which no answer had a majority.

    ``needs_rater`` names the prompts that wait for one more rater, under the policy that asks for one.
    """

    labels: dict[str, Label]
    no_majority: tuple[str, ...]
    needs_rater: tuple[str, ...] = ()


def majority_labels(
    judgements: Iterable[Judgement], question: Question, no_majority: NoMajority = "tie"
) -> Majority:
    """The answer that more than half of a prompt's raters gave.

    Args:
        judgements: records of one kind of rater; other questions are left aside.
        question: appeal or faithfulness.
        no_majority: what a prompt without a majority (2-2-1) becomes; the paper does not say, and the result
            always names these prompts. ``tie``: a tie. ``exclude``: nothing. ``extra_rater``: nothing yet; it
            needs one more rater, whose vote breaks the tie: to lead alone with half of the votes (3-2-1) is
            then enough, and at 2-2-2 it needs another.
    """
    if no_majority not in get_args(NoMajority):
        raise ValueError(
            f"no_majority {no_majority!r} is not known: use one of {', '.join(get_args(NoMajority))}"
        )
    labels: dict[str, Label] = {}
    undecided = []
    for prompt, votes in votes_by_prompt(judgements, question).items():
        (label, count), *others = Counter(votes).most_common(2)
        alone = all(other < count for _, other in others)
        if 2 * count > len(votes) or (no_majority == "extra_rater" and 2 * count == len(votes) and alone):
            labels[prompt] = label
            continue
        undecided.append(prompt)
        if no_majority == "tie":
            labels[prompt] = "Tie"
    return Majority(labels, tuple(undecided), tuple(undecided) if no_majority == "extra_rater" else ())


@dataclass(frozen=True)
class PositionBias:
    """How often the picture on the left was preferred, among the votes for A or B whose sides are known.

    Attributes:
        left: the share in [0, 1]; 0.5 without bias, where sides are drawn per rater and prompt.
        ci95: Wilson's interval.
        p: exact two-sided binomial test of 0.5.
    """

    left: float
    ci95: Interval
    p: float
    num_votes: int


def position_bias(judgements: Iterable[Judgement], question: Question) -> PositionBias | None:
    """The bias of one kind of rater towards the left; None where no vote tells."""
    signs = np.array(
        [
            1 if judgement.answer == judgement.left else -1
            for judgement in _latest(judgements, question).values()
            if judgement.left is not None and judgement.answer in ("A", "B")
        ]
    )
    if not signs.size:
        return None
    share = float(np.mean(signs > 0))
    return PositionBias(share, wilson_ci95(share, len(signs)), _sign_test(signs), len(signs))


@dataclass(frozen=True)
class WinRate:
    """What one model's labels against another's say. Shares are in [0, 1]; intervals are 95 %.

    Attributes:
        win: share of all labels, ties included: the paper's win rate. ``win + tie + lose`` is 1.
        ci95: Wilson's interval of ``win``, on the effective number of labels where prompts repeat.
        win_minus_lose_ci95: Tango's score interval, on the effective number of labels where prompts repeat.
        win_minus_lose_bootstrap95: percentiles of 10,000 resamplings of the prompts, at a fixed seed; too
            narrow for few prompts.
        ties_excluded: W / (W + L), None where every label is a tie.
        sign_test_p: exact two-sided sign test (McNemar's exact) over prompts that are not even.
        two_way_ci95: interval of ``win`` over new prompts and new raters, None without raters; holds for the
            pool that the raters were drawn from, where ``ci95`` holds for these raters alone.
        win_minus_lose_two_way95: the same of ``win_minus_lose``.
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
    two_way_ci95: Interval | None = None
    win_minus_lose_two_way95: Interval | None = None

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
            "win_rate_two_way95": self.two_way_ci95 and list(self.two_way_ci95),
            "win_minus_lose_two_way95": self.win_minus_lose_two_way95 and list(self.win_minus_lose_two_way95),
            "sign_test_p": self.sign_test_p,
            "num_labels": self.num_labels,
            "num_prompts": self.num_prompts,
        }


def win_rate(
    labels: Sequence[str] | NDArray[np.str_],
    *,
    of: Literal["A", "B"],
    prompts: Sequence[str] | None = None,
    raters: Sequence[str] | None = None,
) -> WinRate:
    """How often model ``of`` wins.

    Args:
        labels: N of A, B, Tie.
        of: the model whose wins are counted.
        prompts: the N prompts the labels belong to, where one prompt has several labels (several seeds, or
            single votes instead of majorities). Without it, every label is a prompt of its own.
        raters: the N raters, where labels are single votes and the raters stand for a larger pool.
    """
    array = np.asarray(labels)
    if array.size == 0:
        raise ValueError("there is no label: a win rate needs at least one judged prompt")
    unknown = set(array.tolist()) - set(get_args(Label))
    if unknown:
        raise ValueError(f"label {sorted(unknown)[0]!r} is not known: use A, B or Tie")
    for name, each in (("prompt", prompts), ("rater", raters)):
        if each is not None and len(each) != len(array):
            raise ValueError(f"{len(array)} labels but {len(each)} {name}s: give one {name} for each label")
    clusters = (
        np.arange(len(array)) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
    )
    people = None if raters is None else np.unique(np.asarray(raters), return_inverse=True)[1]

    signs = np.where(array == "Tie", 0, np.where(array == of, 1, -1))
    decided = signs != 0
    ci95, difference_ci95 = _share_ci95(signs > 0, clusters), _difference_ci95(signs, clusters)
    return WinRate(
        win=float(np.mean(signs > 0)),
        tie=float(np.mean(signs == 0)),
        lose=float(np.mean(signs < 0)),
        ci95=ci95,
        win_minus_lose=float(signs.mean()),
        win_minus_lose_ci95=difference_ci95,
        win_minus_lose_bootstrap95=_difference_bootstrap95(signs, clusters),
        ties_excluded=float(np.mean(signs[decided] > 0)) if decided.any() else None,
        ties_excluded_ci95=_share_ci95(signs[decided] > 0, clusters[decided]) if decided.any() else None,
        sign_test_p=_sign_test(np.bincount(clusters, signs)),
        num_labels=len(array),
        num_prompts=int(clusters.max()) + 1,
        two_way_ci95=_two_way95(signs > 0, clusters, people, ci95),
        win_minus_lose_two_way95=_two_way95(signs, clusters, people, difference_ci95),
    )


def vote_share(judgements: Iterable[Judgement], question: Question, *, of: Literal["A", "B"]) -> WinRate:
    """How often single votes prefer model ``of``, clustered by prompt and two-way by prompt and rater.

    Majorities amplify it: at a share of 0.70, five equal raters prefer a model on 84 % of the prompts. Never
    compare the two.
    """
    votes = latest_votes(judgements, question)
    prompts, raters = [prompt for prompt, _ in votes], [rater for _, rater in votes]
    return win_rate(list(votes.values()), of=of, prompts=prompts, raters=raters)


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


def tango_ci95(win: float, lose: float, num: float) -> Interval:
    """Tango's score interval of ``win - lose`` among ``num`` independent answers, ties being what is left.

    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design" (Statistics in Medicine 17, 1998): the differences that a score test at 5 % does not refuse, as
    Wilson's are of a share. The interval from the variance at the estimate, [(W + L) - (W - L)^2] / n, holds
    the truth too seldom for few prompts: at 20 and 83 % wins, 2 % ties, in 86 % of the cases, this in 96 %.

    Args:
        win, lose: shares in [0, 1] that add up to at most 1.
    """
    estimate = win - lose

    def is_refused(difference: float) -> bool:
        # The most likely share of losses if the true difference were this one.
        b = (2 - win + lose) * difference - win - lose
        root = math.sqrt(max(0.0, b * b + 8 * lose * difference * (1 - difference)))
        variance = (root - b) / 2 + difference * (1 - difference)
        return num * (estimate - difference) ** 2 > _Z**2 * variance

    ends = []
    for outermost in (-1.0, 1.0):
        inside, outside = estimate, outermost
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_refused(middle) else (middle, outside)
        ends.append(inside)
    return ends[0], ends[1]


def _variance_of_mean(values: NDArray[Any], clusters: NDArray[np.intp]) -> float:
    """Cluster-robust; with one value per cluster the plain population variance over n."""
    deviations = np.bincount(clusters, values - values.mean())
    return float(deviations @ deviations) / len(values) ** 2


def _num_effective(values: NDArray[Any], clusters: NDArray[np.intp]) -> float:
    """How many independent labels would say as much: fewer by Kish's design effect."""
    independent = float(values.var()) / len(values)
    if independent == 0:
        return len(np.unique(clusters))
    return len(values) / max(1.0, _variance_of_mean(values, clusters) / independent)


def _share_ci95(hits: NDArray[np.bool_], clusters: NDArray[np.intp]) -> Interval:
    return wilson_ci95(float(hits.mean()), _num_effective(hits, clusters))


def _difference_ci95(signs: NDArray[np.int_], clusters: NDArray[np.intp]) -> Interval:
    return tango_ci95(float(np.mean(signs > 0)), float(np.mean(signs < 0)), _num_effective(signs, clusters))


def _difference_bootstrap95(signs: NDArray[np.int_], clusters: NDArray[np.intp]) -> Interval:
    if _variance_of_mean(signs, clusters) == 0:  # no resampling differs from another
        return _difference_ci95(signs, clusters)
    sums = resample(np.stack([np.bincount(clusters, signs), np.bincount(clusters)], axis=1))
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def resample(totals: NDArray[Any]) -> NDArray[Any]:
    """Sums over prompts drawn with replacement, 10,000 times at a fixed seed: (N, D) to (10,000, D)."""
    # Prompts of the same totals are alike, so counting kinds is resampling prompts.
    kinds, counts = np.unique(totals, axis=0, return_counts=True)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return rng.multinomial(counts.sum(), counts / counts.sum(), NUM_DRAWS) @ kinds


def _two_way95(
    values: NDArray[Any],
    clusters: NDArray[np.intp],
    raters: NDArray[np.intp] | None,
    without_spread: Interval,
) -> Interval | None:
    """Bayesian pigeonhole bootstrap (Owen and Eckles 2012, "Bootstrapping data arrays of arbitrary order").

    A vote weighs the product of its prompt's and its rater's weight, both exponential. Few raters would make
    the percentiles too narrow: they are expanded as a t interval is (Hesterberg 2015, "What teachers should
    know about the bootstrap"). Where votes are mostly noise, they are too wide.
    """
    shape = (int(clusters.max()) + 1, 0 if raters is None else int(raters.max()) + 1)
    if raters is None or min(shape) < 2:
        return None
    if values.min() == values.max():
        return without_spread
    from scipy.special import stdtrit  # quantiles of Student's t

    cells = np.zeros((2, *shape), np.float32)
    np.add.at(cells[0], (clusters, raters), values)
    np.add.at(cells[1], (clusters, raters), 1)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    of_prompts, of_raters = (rng.standard_exponential((NUM_DRAWS, num), np.float32) for num in shape)
    sums, counts = ((of_prompts @ cell * of_raters).sum(axis=1) for cell in cells)
    few = min(shape)
    tail = NormalDist().cdf(stdtrit(few - 1, 0.025) * math.sqrt(few / (few - 1)))
    low, high = np.quantile(sums / counts, [tail, 1 - tail])
    return float(low), float(high)


def _sign_test(net: NDArray[Any]) -> float:
    """``net`` holds each prompt's wins minus losses."""
    wins, losses = int((net > 0).sum()), int((net < 0).sum())
    num, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):  # exact in integers: sum of C(num, k)
        tail += term
        term = term * (num - k) // (k + 1)
    return min(1.0, 2 * tail / 2**num)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of planned comparisons: below 0.05, no more than 5 % of such plans find a false one.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def benjamini_hochberg(p_values: Mapping[str, float]) -> dict[str, float]:
    """q-values of exploratory slices: among those up to q, a share of about q is expected to be false.

    Benjamini and Hochberg, "Controlling the false discovery rate" (1995).
    """
    adjusted, smallest = {}, 1.0
    for rank, name in reversed(list(enumerate(sorted(p_values, key=p_values.__getitem__), start=1))):
        smallest = min(smallest, len(p_values) / rank * p_values[name])
        adjusted[name] = smallest
    return {name: adjusted[name] for name in p_values}
