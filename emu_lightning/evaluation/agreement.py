"""How far raters agree, for nominal labels and with votes missing.

Alpha corrects for the agreement that chance alone would give, and so it falls where nearly all prompts have
one answer, though the raters are no worse: read it beside the raw agreement and the prevalence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from emu_lightning.evaluation.votes import Judgement, Question, latest_votes

Rating = tuple[Hashable, Hashable, Hashable]  # item, rater, label
LabelCounts = tuple[tuple[Hashable, int], ...]  # of one item: each label and its number of votes


@dataclass(frozen=True)
class PairAgreement:
    """Two raters: the share in [0, 1] of the items both rated that they labelled alike."""

    raters: tuple[Hashable, Hashable]
    raw: float
    num_items: int


@dataclass(frozen=True)
class Agreement:
    """What a set of votes says about its raters.

    Attributes:
        alpha: Krippendorff's alpha, at most 1; None where undefined.
        raw: share of the pairs of votes on one item that are alike; None without a pair.
        prevalence: each label's share of all votes, adding to 1.
        num_pairs: pairs of votes on one item.
        by_pair: each two raters with an item in common.
    """

    alpha: float | None
    raw: float | None
    prevalence: dict[Hashable, float]
    num_pairs: int
    by_pair: tuple[PairAgreement, ...]


def agreement(judgements: Iterable[Judgement], question: Question) -> Agreement:
    """Agreement of one kind of rater on one question, Both and Neither as Tie.

    Raises:
        ValueError: people's and models' judgements are mixed.
    """
    votes = latest_votes(judgements, question)
    return rating_agreement((prompt, rater, label) for (prompt, rater), label in votes.items())


def rating_agreement(ratings: Iterable[Rating]) -> Agreement:
    """Agreement of any nominal ratings (item, rater, label); a rater's later label of an item counts."""
    items = _labels_by_item(ratings)
    shapes = _shapes(items)
    alike: Counter[tuple[Hashable, Hashable]] = Counter()
    both: Counter[tuple[Hashable, Hashable]] = Counter()
    for labels in items.values():
        for pair in combinations(sorted(labels, key=str), 2):
            both[pair] += 1
            alike[pair] += labels[pair[0]] == labels[pair[1]]
    shares = Counter(label for labels in items.values() for label in labels.values())
    return Agreement(
        alpha=alpha_of_counts(shapes),
        raw=raw_of_counts(shapes),
        prevalence={label: count / shares.total() for label, count in shares.most_common()},
        num_pairs=both.total(),
        by_pair=tuple(PairAgreement(pair, alike[pair] / num, num) for pair, num in both.items()),
    )


def krippendorff_alpha(ratings: Iterable[Rating]) -> float | None:
    """Krippendorff's alpha of nominal ratings (item, rater, label), votes missing at will.

    Items with one vote say nothing and are left aside. A rater's later label of an item counts.
    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C.

    Returns:
        1 for perfect agreement, 0 for that of chance, below 0 for less; None where it is undefined: no item
        has two votes, or all of them are one label.
    """
    return alpha_of_counts(_shapes(_labels_by_item(ratings)))


def _labels_by_item(ratings: Iterable[Rating]) -> dict[Hashable, dict[Hashable, Hashable]]:
    items: dict[Hashable, dict[Hashable, Hashable]] = {}
    for item, rater, label in ratings:
        items.setdefault(item, {})[rater] = label
    return items


def _shapes(items: Mapping[Hashable, Mapping[Hashable, Hashable]]) -> Counter[LabelCounts]:
    return Counter(tuple(Counter(labels.values()).items()) for labels in items.values())


def raw_of_counts(items: Mapping[LabelCounts, int]) -> float | None:
    """The share of the pairs of votes on one item that are alike; None without a pair.

    Args:
        items: how many items have these numbers of votes. Raters need not be known, and few of the many items
            of a large batch differ in this.
    """
    pairs = alike = 0
    for counts, num_items in items.items():
        votes = sum(count for _, count in counts)
        pairs += num_items * votes * (votes - 1)
        alike += num_items * sum(count * (count - 1) for _, count in counts)
    return alike / pairs if pairs else None


def alpha_of_counts(items: Mapping[LabelCounts, int]) -> float | None:
    """:func:`krippendorff_alpha` of how many items have these numbers of votes."""
    totals: Counter[Hashable] = Counter()
    observed = 0.0  # disagreeing pairs, each item weighing as much as its number of votes
    for counts, num_items in items.items():
        votes = sum(count for _, count in counts)
        if votes < 2:
            continue
        totals.update({label: num_items * count for label, count in counts})
        alike = sum(count * (count - 1) for _, count in counts)
        observed += num_items * (votes - alike / (votes - 1))
    num = totals.total()
    expected = num**2 - sum(count**2 for count in totals.values())
    return 1 - (num - 1) * observed / expected if expected else None
