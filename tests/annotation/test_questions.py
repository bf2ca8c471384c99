from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any, get_args

import pytest

from emu_lightning.annotation.questions import QUESTIONS, Appeal, Faithfulness, Photography, Screening
from emu_lightning.evaluation import votes
from emu_lightning.evaluation.votes import Judgement, majority_labels

REVIEW = {"composition": 2, "lighting": 1, "colour": 0, "subject": 2, "story": 1, "accept": True}
GOOD = {
    "screening": {"choice": "keep"},
    "photography": {**REVIEW, "reasons": ["flat light"], "comment": "dim"},
    "caption": {"text": "A fox."},
    "verification": {"verdict": "edit", "text": "A red fox."},
    "appeal": {"choice": "left"},
    "faithfulness": {"choice": "neither"},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_is_whole(name: str) -> None:
    question = QUESTIONS[name]
    assert question.check(GOOD[name]) == GOOD[name]
    assert set(question.roles) <= {"generalist", "specialist"}  # a lead sees the standing: not blind
    assert len(question.guideline.split("\n\n")) >= 3
    assert question.num_people >= 1 and question.num_pictures in (1, 2)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_key_gives_a_part_of_an_answer(name: str) -> None:
    question = QUESTIONS[name]
    for part in question.keys.values():
        given = {**GOOD[name], **part}
        if given.get("verdict", "edit") != "edit":
            del given["text"]
        question.check(given)
    of_the_page = set("zg?+- ") | {"Escape", "Enter"} | (set("jklc012") if name == "photography" else set())
    assert not of_the_page & question.keys.keys()


@pytest.mark.parametrize("name", sorted(set(QUESTIONS) - {"caption"}))
def test_each_option_has_a_key(name: str) -> None:
    question = QUESTIONS[name]
    assert {question.option(part) for part in question.keys.values()} == question.options.keys()


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("screening", {"choice": "A"}, "keep"),
        ("screening", {"choice": ["keep"]}, "keep"),
        ("screening", {}, "keep"),
        ("screening", {"choice": "keep", "why": "x"}, "why"),
        ("photography", {**REVIEW, "story": 3}, "story"),
        ("photography", {**REVIEW, "story": True}, "story"),
        ("photography", {**REVIEW, "story": 1.0}, "story"),
        ("photography", {**REVIEW, "accept": 1}, "accept"),
        ("photography", {key: REVIEW[key] for key in REVIEW if key != "colour"}, "colour"),
        ("photography", {**REVIEW, "reasons": ["ugly"]}, "reasons"),
        ("photography", {**REVIEW, "reasons": [{}]}, "reasons"),
        ("photography", {**REVIEW, "reasons": "flat light"}, "reasons"),
        ("photography", {**REVIEW, "comment": "x" * 501}, "501"),
        ("caption", {"text": " \n "}, "0 characters"),
        ("caption", {"text": "x" * 2001}, "2001"),
        ("caption", {"text": "a\x00b"}, "control"),
        ("caption", {"text": "\ud800"}, "control"),
        ("caption", {"text": "a\u202eb"}, "control"),
        ("caption", {"text": "a\u2028b"}, "control"),
        ("caption", {"text": 5}, "text"),
        ("verification", {"verdict": "edit"}, "text"),
        ("verification", {"verdict": "accept", "text": "A fox."}, "text"),
        ("verification", {"verdict": "fine"}, "verdict"),
        ("appeal", {"choice": "A"}, "left"),  # a page knows no slots
        ("appeal", {"choice": "both"}, "tie"),
        ("faithfulness", {"choice": "tie"}, "both"),
    ],
)
def test_what_is_no_answer_is_refused_by_name(name: str, answer: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        QUESTIONS[name].check(answer)
    assert "\n" not in str(error.value)


def test_texts_lose_their_edges_and_keep_their_letters() -> None:
    text = "Zwei Füchse, 狐\u3000🦊\nim\u00a0Schnee, می\u200cخواهم, 👩\u200d🎨"
    assert QUESTIONS["caption"].check({"text": f"  {text}\r\n"}) == {"text": text}


@pytest.mark.parametrize("question", [Appeal, Faithfulness])
def test_slots_and_sides_are_inverse_and_mirror_each_other(question: type[Appeal]) -> None:
    mirrored = {"left": "right", "right": "left"}
    for option in question.options:
        answer = question.check({"choice": option})
        for left in ("A", "B"):
            assert question.to_sides(question.to_slots(answer, left), left) == answer
        mirror = {"choice": mirrored.get(option, option)}
        assert question.to_slots(answer, "A") == question.to_slots(mirror, "B")
    assert question.to_slots({"choice": "left"}, "B") == {"choice": "B"}


@pytest.mark.parametrize("question", [Appeal, Faithfulness])
def test_stored_pairs_are_judgements(question: type[Appeal]) -> None:
    stored = [question.to_slots({"choice": option}, "A") for option in question.options]
    for answer in stored:
        Judgement("p", question.name, answer["choice"], "r", "person")  # type: ignore[arg-type]
        assert question.vote(answer) in get_args(votes.Label)


@pytest.mark.parametrize("num_people", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("question", [Appeal, Faithfulness])
def test_more_people_are_wanted_exactly_where_there_is_no_majority(
    question: type[Appeal], num_people: int
) -> None:
    """Against the majority rule of the evaluation; and the number is the smallest that can make one."""
    choices = ["A", "B", *question._stored.values()]
    for given in combinations_with_replacement(choices, num_people):
        answers = [{"choice": choice} for choice in given]

        def undecided(rest: tuple[str, ...], given: tuple[str, ...] = given) -> bool:
            records = [
                Judgement("p", question.name, choice, str(rater), "person")  # type: ignore[arg-type]
                for rater, choice in enumerate(given + rest)
            ]
            return bool(majority_labels(records, question.name).no_majority)  # type: ignore[arg-type]

        assert question.wanted(answers, num_people) == num_people
        wanted = question.wanted(answers, num_people, extra_rater=True)
        assert (wanted > num_people) == undecided(())
        if wanted > num_people:
            num_more = wanted - num_people
            assert any(not undecided((choice,) * num_more) for choice in choices)
            assert all(undecided((choice,) * (num_more - 1)) for choice in choices)
        # What the further people say brings in nobody else.
        assert question.wanted([*answers, {"choice": "A"}], num_people, extra_rater=True) == wanted


def test_screening_asks_a_third_on_a_split_and_unsure_keeps() -> None:
    keep, reject, unsure = ({"choice": choice} for choice in ("keep", "reject", "unsure"))
    assert Screening.wanted([], 2) == Screening.wanted([keep], 2) == 2
    assert Screening.wanted([keep, reject], 2) == Screening.wanted([reject, unsure], 2) == 3
    assert Screening.wanted([keep, unsure], 2) == Screening.wanted([reject, reject], 2) == 2
    assert Screening.matches(unsure, keep) and not Screening.matches(reject, keep)


def test_a_lead_decides_only_where_specialists_disagree() -> None:
    accept, reject = {**REVIEW, "accept": True}, {**REVIEW, "accept": False}
    assert Photography.needs_lead([accept, reject])
    assert not Photography.needs_lead([accept, {**accept, "story": 0}])
    assert not Photography.needs_lead([accept])
    assert not Appeal.needs_lead([{"choice": "A"}, {"choice": "B"}])


@pytest.mark.parametrize(
    ("name", "gold", "right", "wrong"),
    [
        ("screening", {"choice": "reject"}, {"choice": "reject"}, {"choice": "unsure"}),
        ("photography", {"accept": False}, {**REVIEW, "accept": False}, REVIEW),
        ("photography", {"accept": True, "colour": 0}, REVIEW, {**REVIEW, "colour": 1}),
        ("verification", {"verdict": "edit"}, {"verdict": "edit", "text": "x"}, {"verdict": "reject"}),
        ("appeal", {"choice": "A"}, {"choice": "A"}, {"choice": "Tie"}),
        ("faithfulness", {"choice": "Both"}, {"choice": "Both"}, {"choice": "Neither"}),
    ],
)
def test_gold(name: str, gold: dict[str, Any], right: dict[str, Any], wrong: dict[str, Any]) -> None:
    question = QUESTIONS[name]
    assert question.check_gold(gold) == gold
    assert question.matches(right, gold) and not question.matches(wrong, gold)


@pytest.mark.parametrize(
    ("name", "gold"),
    [
        ("appeal", {"choice": "left"}),
        ("appeal", {}),
        ("photography", {"colour": 2}),
        ("photography", {"accept": True, "reasons": []}),
        ("caption", {"text": "A fox."}),
    ],
)
def test_gold_that_no_answer_could_match_is_refused(name: str, gold: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        QUESTIONS[name].check_gold(gold)
