"""The page on which votes are read: that it says what the votes say, to the right people, and safely."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu_lightning.evaluation.generation import PictureFolder, open_folder
from emu_lightning.evaluation.outcomes import Judged, Outcome, outcome
from emu_lightning.evaluation.prompts import PromptSet
from emu_lightning.evaluation.votes import Judgement
from emu_lightning.evaluation.votes_page import votes_page
from tests.evaluation.test_outcomes import votes_on

HOSTILE = "<script>alert('x')</script>"


def words_of(page: str) -> str:
    """What a person sees, in one line."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)
    return " ".join(text.replace("\u00a0", " ").split())


def judged_of(
    answers: Sequence[str],
    name: str = "set",
    models: tuple[str, str] = ("base", "tuned"),
    pictures: tuple[PictureFolder, PictureFolder] | None = None,
    further: Sequence[Judgement] = (),
) -> Judged:
    prompts = PromptSet(name, tuple(f"text {n}" for n in range(len(answers))), (), (), "0")
    votes = [one for n, each in enumerate(answers) for one in votes_on(f"text {n}", each)]
    return Judged(*models, prompts, [*votes, *further], pictures)


def outcomes_of(*judged: Judged) -> list[Outcome]:
    return [outcome(one, question, kind, "tie") for one in judged for question, kind in one.kinds]


def page_of(*judged: Judged) -> str:
    facts = {"votes.jsonl": "sha256 12ab"}
    return votes_page("A page", outcomes_of(*judged), {"no_majority": "tie"}, command="emu x", facts=facts)


@pytest.mark.parametrize(
    "answers,sentence",
    [
        (
            ["B"] * 30 + ["A"] * 10,
            "On looks, tuned is preferred: tuned wins 75.0 % of 40 prompts and loses 25.0 %",
        ),
        (
            ["A"] * 30 + ["B"] * 10,
            "On looks, base is preferred: tuned wins 25.0 % of 40 prompts and loses 75.0 %",
        ),
        (["A"] * 20 + ["B"] * 20, "On looks, no clear difference: tuned wins 50.0 % of 40 prompts"),
    ],
)
def test_the_sentence_is_as_good_or_bad_as_the_votes(answers: list[str], sentence: str) -> None:
    assert sentence in words_of(page_of(judged_of(answers)))


def test_prompt_sets_that_disagree_are_not_called_a_win() -> None:
    sets = judged_of(["B"] * 20, "one"), judged_of(["A"] * 20, "two")
    words = words_of(page_of(*sets))
    assert "On looks, it depends on the prompts: tuned wins 100.0 % of 20 prompts" in words
    both = words_of(page_of(sets[0], judged_of(["B"] * 20, "two")))
    assert "On looks, tuned is preferred: tuned wins 100.0 % of 20 prompts and loses 0.0 % (one)" in both


def test_the_tables_rows_add_to_100_and_hold_the_intervals() -> None:
    """A third each would be 33.3, 33.3 and 33.3."""
    judged = judged_of(["B", "A", "T"] * 10)
    page = page_of(judged)
    row = re.search(r'<tr class="outcome"><th scope="row">set</th>(.*?)</tr>', page)
    assert row is not None
    win, tie, lose = (float(each) for each in re.findall(r'<td class="number">([\d.]+)', row[1])[:3])
    assert (win, tie, lose) == (33.3, 33.4, 33.3)
    (one,) = outcomes_of(judged)
    assert f"{100 * one.rate.ci95[0]:.1f} to {100 * one.rate.ci95[1]:.1f} %" in words_of(row[1])


def test_what_has_no_majority_is_counted_and_its_policy_told() -> None:
    judged = judged_of(["BBAAT", "BBBAA", "AABBT"])
    assert "Prompts without a majority : 2 of 3 on appeal (66.7 %). They count as ties." in words_of(
        page_of(judged)
    )
    left_out = votes_page("x", [outcome(judged, "appeal", "person", "exclude")], {}, command="x", facts={})
    assert "They are left out of every figure above." in words_of(left_out)


def test_models_are_shown_apart_and_alone_are_called_models() -> None:
    by_models = votes_on("text 0", "A", kind="model")
    words = words_of(page_of(judged_of(["BBB"], further=by_models)))
    assert "Judged by 3 people in 3 votes." in words and "What models said" in words
    alone = Judged("base", "tuned", PromptSet.of("set", ["text 0"]), by_models)
    words = words_of(page_of(alone))
    assert "Judged by one model in 1 vote. No person has judged." in words and "What models said" not in words


def test_agreement_and_sides_are_told_in_words() -> None:
    votes = [one for n in range(30) for one in votes_on(f"text {n}", "BBA", left="B")]
    judged = Judged("base", "tuned", PromptSet.of("set", [f"text {n}" for n in range(30)]), votes)
    words = words_of(page_of(judged))
    # Of three pairs of votes one agrees; by lot (2/3)^2 + (1/3)^2 would.
    assert "appeal 90 33 % 56 %" in words
    assert "of 90 votes for a picture, 66.7 % went to the left one" in words
    assert "raters lean to the left. tuned stood on the left in 100.0 % of votes" in words
    assert "would move the result" in words
    assert "person 0 30 50 % 100 % 0 % 0 %" in words  # agrees with one of two others


def test_three_models_are_set_in_order() -> None:
    pairs = [("base", "tuned"), ("base", "sdxl"), ("sdxl", "tuned")]
    page = words_of(page_of(*(judged_of(["B"] * 40, models=pair) for pair in pairs)))
    assert "On looks, tuned is preferred to all others." in page
    assert "tuned before sdxl" in page and "told apart" in page and "tuned against base" in page


@pytest.fixture
def folders(tmp_path: Path) -> tuple[PictureFolder, PictureFolder]:
    """Thirty prompts, of base in 8 by 6 pixels and of tuned in 300 by 200, made elsewhere."""
    for name, size in (("base", (8, 6)), ("tuned", (300, 200))):
        (tmp_path / name).mkdir()
        for row in range(30):
            Image.new("RGB", size, (row, 0, 0)).save(tmp_path / name / f"{row:05d}.png")
    prompts = PromptSet.of("set", [f"text {n}" for n in range(30)])
    return open_folder(tmp_path / "base", prompts), open_folder(tmp_path / "tuned", prompts)


def test_pictures_stand_by_verdict_side_by_side(folders: tuple[PictureFolder, PictureFolder]) -> None:
    answers = ["BBBBA"] * 20 + ["AAAAA"] * 3 + ["AABBT"] * 2 + ["BBBAT"] * 5
    page = page_of(judged_of(answers, pictures=folders))
    words = words_of(page)
    for title in ("tuned won clearly, 20 prompts", "tuned lost clearly, 3 prompts", "split, 2 prompts"):
        assert f"appeal: {title}" in words
    assert page.count("data:image/png") == page.count("data:image/jpeg") == 8 + 3 + 2
    assert "base 1 tuned 4 text 0 " in words and "base 5 tuned 0 text 20 " in words
    assert "base 2 tuned 2 text 23 1 tied" in words
    assert words.index("text 0 ") < words.index("text 19 ") < words.index("text 20 ")
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)


def test_no_verdict_shows_no_pictures(folders: tuple[PictureFolder, PictureFolder]) -> None:
    assert "data:image" not in page_of(judged_of(["TTTBA"] * 30, pictures=folders))


def test_hostile_names_prompts_and_raters_are_escaped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / "00000.png")
    prompts = PromptSet(HOSTILE, (HOSTILE,) * 1, (HOSTILE,), (), "0")
    votes = [Judgement(HOSTILE, "appeal", "B", HOSTILE, "person", "A")]
    pictures = open_folder(tmp_path / "a", prompts), open_folder(tmp_path / "b", prompts)
    judged = Judged(f"a {HOSTILE}", f"b {HOSTILE}", prompts, votes, pictures)
    page = votes_page(HOSTILE, outcomes_of(judged), {"x": HOSTILE}, command=HOSTILE, facts={HOSTILE: HOSTILE})
    assert "<script" not in page and page.count("&lt;script&gt;") > 10
