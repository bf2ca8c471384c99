"""Agreement against published examples and the coincidence matrix that defines alpha."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import permutations

import numpy as np
import pytest

from emu_lightning.evaluation.agreement import agreement, krippendorff_alpha, rating_agreement
from emu_lightning.evaluation.votes import Judgement

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), sections A, B and C: a row for each
# observer, a dot for a missing value, and the alpha printed there.
PUBLISHED = [
    (["0100000010", "1110010000"], 0.095),
    (["aabbdcccedda", "babbbccceddd"], 0.692),
    (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
]


def ratings_of(rows: Sequence[str]) -> list[tuple[int, int, str]]:
    return [
        (i, rater, label) for rater, row in enumerate(rows) for i, label in enumerate(row) if label != "."
    ]


def alpha_by_matrix(rows: Sequence[str]) -> float:
    coincidences: Counter[tuple[str, str]] = Counter()
    for column in zip(*rows, strict=True):
        labels = [label for label in column if label != "."]
        for pair in permutations(labels, 2):
            coincidences[pair] += 1 / (len(labels) - 1)  # type: ignore[assignment]
    totals = Counter[str]()
    for (label, _), count in coincidences.items():
        totals[label] += count
    num = sum(totals.values())
    expected = sum(totals[a] * totals[b] for a in totals for b in totals if a != b) / (num - 1)
    return 1 - sum(count for (a, b), count in coincidences.items() if a != b) / expected


@pytest.mark.parametrize("rows,published", PUBLISHED)
def test_alpha_equals_the_published_examples(rows: list[str], published: float) -> None:
    assert round(krippendorff_alpha(ratings_of(rows)), 3) == published  # type: ignore[arg-type]
    assert krippendorff_alpha(ratings_of(rows)) == pytest.approx(alpha_by_matrix(rows))


def test_alpha_equals_its_definition_with_votes_missing_at_random() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = ["".join(rng.choice(list("ABT."), 30, p=[0.4, 0.2, 0.2, 0.2])) for _ in range(5)]
        assert krippendorff_alpha(ratings_of(rows)) == pytest.approx(alpha_by_matrix(rows))


@pytest.mark.parametrize(
    "rows,alpha", [(["AB"] * 3, 1), (["AA", "AA"], None), (["A.", ".B"], None), ([], None)]
)
def test_alpha_is_one_where_all_agree_and_undefined_where_nothing_varies(
    rows: list, alpha: float | None
) -> None:
    assert krippendorff_alpha(ratings_of(rows)) == alpha


@pytest.mark.parametrize("prevalence", [0.5, 0.9])
def test_equal_raters_have_a_lower_alpha_where_one_label_prevails(prevalence: float) -> None:
    """Two raters who are right nine times in ten, independently, in exact proportions."""
    num, rows = 20_000, ["", ""]
    for label, other, share in (("A", "B", prevalence), ("B", "A", 1 - prevalence)):
        for first, second, chance in (
            (label, label, 0.81),
            (label, other, 0.09),
            (other, label, 0.09),
            (other, other, 0.01),
        ):
            rows = [
                rows[0] + first * round(num * share * chance),
                rows[1] + second * round(num * share * chance),
            ]
    result = rating_agreement(ratings_of(rows))
    seen = 0.9 * prevalence + 0.1 * (1 - prevalence)
    by_chance = seen**2 + (1 - seen) ** 2
    assert result.raw == pytest.approx(0.82) and result.prevalence["A"] == pytest.approx(seen)
    assert result.alpha == pytest.approx((0.82 - by_chance) / (1 - by_chance), abs=1e-4)


def test_raw_agreement_of_all_and_of_each_two_raters_is_counted() -> None:
    result = rating_agreement(ratings_of(["AAB.", "ABBA", "A..A"]))
    assert result.num_pairs == 6 and result.raw == pytest.approx(5 / 6)
    assert {pair.raters: (pair.raw, pair.num_items) for pair in result.by_pair} == {
        (0, 1): (pytest.approx(2 / 3), 3),
        (0, 2): (1, 1),
        (1, 2): (1, 2),
    }
    assert result.prevalence == pytest.approx({"A": 6 / 9, "B": 3 / 9})


def test_the_votes_that_count_are_compared() -> None:
    def vote(
        prompt: str, answer: str, rater: str, question: str = "faithfulness", kind: str = "person"
    ) -> Judgement:
        return Judgement(prompt, question, answer, rater, kind)  # type: ignore[arg-type]

    records = [
        vote("p", "A", "ada"),
        vote("p", "Both", "ada"),  # she changed her mind
        vote("p", "Neither", "emil"),
        vote("q", "B", "ada"),
        vote("q", "B", "emil"),
        vote("q", "A", "emil", "appeal"),
    ]
    result = agreement(records, "faithfulness")
    assert (result.alpha, result.raw, result.num_pairs) == (1, 1, 2)
    assert result.prevalence == {"Tie": 0.5, "B": 0.5}
    assert json.loads(json.dumps(asdict(result)))["by_pair"][0]["raters"] == ["ada", "emil"]
    with pytest.raises(ValueError, match="never pooled"):
        agreement([*records, vote("p", "Tie", "clip", kind="model")], "faithfulness")


def test_without_two_votes_on_a_prompt_there_is_no_agreement() -> None:
    result = agreement([Judgement("p", "appeal", "A", "ada", "person")], "appeal")
    assert result.alpha is None and result.raw is None and result.num_pairs == 0
