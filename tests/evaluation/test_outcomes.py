"""What votes say, on votes whose answer can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from emu_lightning.evaluation.outcomes import Judged, in_order, outcome, results_of, strengths
from emu_lightning.evaluation.prompts import PromptSet
from emu_lightning.evaluation.votes import Judgement


def votes_on(
    prompt: str, answers: str, question: str = "appeal", kind: str = "person", left: str | None = None
) -> list[Judgement]:
    """One vote for each letter: A, B, T(ie); (b)oth, (n)either."""
    words = {"A": "A", "B": "B", "T": "Tie", "b": "Both", "n": "Neither"}
    return [
        Judgement(prompt, question, words[answer], f"{kind} {n}", kind, left)  # type: ignore[arg-type]
        for n, answer in enumerate(answers)
    ]


def prompt_set(num: int, categories: Sequence[str] = (), challenges: Sequence[str] = ()) -> PromptSet:
    return PromptSet("set", tuple(f"text {n}" for n in range(num)), tuple(categories), tuple(challenges), "0")


FOUR = ["BBBBA", "AAATB", "BBAAT", "TTTBA"]  # B, A, none, Tie


def judged_of(answers: Sequence[str] = FOUR, **options: object) -> Judged:
    judgements = [one for n, each in enumerate(answers) for one in votes_on(f"text {n}", each)]
    return Judged("base", "tuned", prompt_set(len(answers)), judgements, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy,shares,waiting",
    [("tie", (1 / 4, 2 / 4, 1 / 4), 0), ("exclude", (1 / 3,) * 3, 0), ("extra_rater", (1 / 3,) * 3, 1)],
)
def test_majorities_votes_and_what_has_none(policy: str, shares: tuple[float, ...], waiting: int) -> None:
    found = outcome(judged_of(), "appeal", "person", policy)  # type: ignore[arg-type]
    assert (found.rate.win, found.rate.tie, found.rate.lose) == pytest.approx(shares)
    # 8 of 20 votes are for B, 5 are ties: counted by hand in FOUR.
    assert (found.share.win, found.share.tie, found.share.lose) == pytest.approx((0.4, 0.25, 0.35))
    told = found.to_dict()
    assert told["no_majority"]["policy"] == policy and told["no_majority"]["num_prompts"] == 1
    assert told["no_majority"]["share"] == 1 / 4 and len(told["no_majority"]["need_a_rater"]) == waiting
    assert (told["num_raters"], told["num_votes"]) == (5, 20)
    assert told["win_rate"] + told["tie_rate"] + told["lose_rate"] == pytest.approx(1)
    json.dumps(told, allow_nan=False)


def test_questions_and_kinds_of_raters_stand_apart() -> None:
    judgements = [*votes_on("text 0", "BBA"), *votes_on("text 0", "bnA", "faithfulness")]
    judgements += [*votes_on("text 0", "A", kind="model"), *votes_on("text 1", "T", "faithfulness", "model")]
    judged = Judged("base", "tuned", prompt_set(2), judgements)
    assert judged.kinds == [
        ("appeal", "person"), ("faithfulness", "person"), ("appeal", "model"), ("faithfulness", "model"),
    ]  # fmt: skip
    found = {key: outcome(judged, *key, "tie") for key in judged.kinds}
    assert [found[key].rate.win for key in judged.kinds] == [1, 0, 0, 0]
    assert found["faithfulness", "person"].answers == {"Both": 1, "Neither": 1, "A": 1}
    assert found["faithfulness", "person"].majority.labels == {"text 0": "Tie"}
    assert found["appeal", "model"].raters == ["model 0"]
    ordered = in_order([found[key] for key in reversed(judged.kinds)])
    assert [(one.question, kind) for kind, ones in ordered.items() for one in ones] == judged.kinds
    assert len(results_of(list(found.values()))["comparisons"]) == 4


def test_a_prompt_is_known_by_text_by_id_or_by_both() -> None:
    prompts = PromptSet("set", ("a cat", "a dog", "a cat"), (), (), "0", ("p1", "p2", "p3"))
    judgements = [*votes_on("a cat [p3]", "B"), *votes_on("p2", "A"), *votes_on("a cat", "T")]
    judged = Judged("base", "tuned", prompts, judgements)
    assert [judged.row_of[one.prompt] for one in judgements] == [2, 1, 0]
    with pytest.raises(ValueError, match="1 judged prompts are not in 'set', such as 'a hen'"):
        Judged("base", "tuned", prompts, votes_on("a hen", "B"))
    with pytest.raises(ValueError, match="both models are called 'base'"):
        Judged("base", "base", prompts, judgements)


def test_sides_are_counted_with_who_stood_there() -> None:
    judgements = [*votes_on("text 0", "BBA", left="B"), *votes_on("text 1", "A", left="A")]
    judgements += votes_on("text 2", "AA")  # of unknown sides
    found = outcome(Judged("base", "tuned", prompt_set(3), judgements), "appeal", "person", "tie")
    assert found.position is not None and found.position.num_votes == 4
    assert (found.position.left, found.b_on_the_left) == (3 / 4, 3 / 4)
    assert outcome(judged_of(), "appeal", "person", "tie").position is None


def test_no_label_at_all_is_told_in_a_line() -> None:
    judged = judged_of(["AB", "BT"])
    assert outcome(judged, "appeal", "person", "tie").rate.tie == 1
    with pytest.raises(ValueError, match="no prompt of 'set' has a majority on appeal"):
        outcome(judged, "appeal", "person", "exclude")


def test_slices_have_the_rates_of_their_prompts_and_small_ones_are_left_out() -> None:
    answers = ["B"] * 6 + ["A"] * 2 + ["T"] + ["A"] * 5 + ["B"] * 4
    categories = ["Arts"] * 9 + ["Food"] * 5 + ["Rare"] * 4
    challenges = ["Basic"] * 12 + ["Style & Format"] * 6
    judgements = [one for n, each in enumerate(answers) for one in votes_on(f"text {n}", each)]
    judged = Judged("base", "tuned", prompt_set(18, categories, challenges), judgements)
    found = outcome(judged, "appeal", "person", "tie")
    assert {group: set(rates) for group, rates in found.slices.items()} == {
        "category": {"Arts", "Food"},
        "challenge": {"Basic", "Style & Format"},
        "style": {"stylized (our choice)"},  # the rest: 3 of Food
    }
    assert (found.slices["category"]["Arts"].win, found.slices["category"]["Food"].win) == (6 / 9, 0)
    p = [rate.sign_test_p for rates in found.slices.values() for rate in rates.values()]
    q = [found.slice_q[group][name] for group, rates in found.slices.items() for name in rates]
    assert q == pytest.approx(stats.false_discovery_control(p))
    assert found.slice_q["category"].keys() == {"Arts", "Food"}
    assert outcome(judged_of(), "appeal", "person", "tie").slices == {}


def test_planned_comparisons_are_corrected_together() -> None:
    """Sign tests of 9 : 1, 8 : 2 and 5 : 5, by Holm's steps written out."""
    found = [
        outcome(judged_of(["B"] * wins + ["A"] * (10 - wins)), "appeal", "person", "tie")
        for wins in (8, 9, 5)
    ]
    p = [stats.binomtest(wins, 10).pvalue for wins in (8, 9, 5)]
    told = [one["sign_test_p_holm"] for one in results_of(found)["comparisons"]]
    assert told == pytest.approx([max(3 * p[1], 2 * p[0]), 3 * p[1], 1.0])


def test_three_models_are_set_in_one_order_and_two_are_not() -> None:
    rng = np.random.default_rng(0)
    skill = {"base": 0.0, "sdxl": 0.7, "tuned": 2.0}
    found = []
    for a, b in (("base", "tuned"), ("base", "sdxl"), ("sdxl", "tuned")):
        chance = 1 / (1 + np.exp(skill[a] - skill[b]))
        answers = ["B" if rng.random() < chance else "A" for _ in range(200)]
        judgements = [one for n, each in enumerate(answers) for one in votes_on(f"text {n}", each)]
        found.append(outcome(Judged(a, b, prompt_set(200), judgements), "appeal", "person", "tie"))
    assert strengths(found[:1]) == {} and "strengths" not in results_of(found[:1])
    fit = strengths(found)["appeal"]
    assert list(fit.strengths) == ["tuned", "sdxl", "base"] and fit.num_prompts == 200
    assert fit.differences["tuned", "base"].value == pytest.approx(2.0, abs=0.5)
    told = results_of(found)["strengths"]["person"]["appeal"]
    assert told["num_comparisons"] == 600
