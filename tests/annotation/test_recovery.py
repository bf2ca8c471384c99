"""What was acknowledged is there after the server was killed, on both databases and by its real process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import multinomial
from sqlalchemy import create_engine, text

from benchmarks import annotation, annotation_pages
from benchmarks.annotation import (
    compare,
    load_on,
    majority_probability,
    pairs,
    tango_coverage,
    vote_probabilities,
    wilson_coverage,
)
from benchmarks.annotation_client import Acknowledged
from emu_lightning.annotation.questions import QUESTIONS
from emu_lightning.annotation.store import Store
from emu_lightning.evaluation.votes import tango_ci95


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_acknowledged_vote_is_lost(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty people, three hundred votes, two kills."""
    monkeypatch.setattr(annotation, "THINK_SECONDS", 0.2)
    url = None if kind == "sqlite" else request.getfixturevalue("postgresql_url")
    found = load_on(tmp_path / "store", url, annotators=20, votes=300, kills=2)
    assert (found["votes"], found["kills"]) == (300, 2)
    assert (found["lost"], found["duplicated"], found["over_assigned"], found["unknown"]) == (0, 0, 0, 0)
    assert found["refused"] == {} and found["errors"] == {}


@pytest.fixture
def voted(sqlite_store: Store, tmp_path: Path) -> tuple[str, list[Acknowledged]]:
    """A vote of two people on each of two pairs, and what they were told."""
    batch = sqlite_store.add_batch("appeal", "a", num_people=2)
    sqlite_store.add_items(batch, pairs(tmp_path, ["A", "B"]))
    votes = []
    for number in range(2):
        person = sqlite_store.add_person(f"person {number}", "generalist")
        for lent in sqlite_store.lend(person, batch, 2):
            nonce = f"{number}-{lent.id}"
            seen = {"left": True, "right": True}
            sqlite_store.answer(person, lent.token, {"choice": "left"}, nonce, seen, {})
            votes.append(Acknowledged(nonce, lent.token, "left", 0.1, 0.1))
    return f"sqlite:///{tmp_path / 'votes.db'}", votes


GOOD = {"lost": 0, "duplicated": 0, "over_assigned": 0, "unknown": 0}


def test_the_comparison_finds_nothing_where_all_is_well(voted) -> None:
    assert compare(*voted) == GOOD


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        ("DELETE FROM events WHERE id = 1", {"lost": 1}),
        ("UPDATE events SET body = json_replace(body, '$.answer.choice', 'Tie') WHERE id = 2", {"lost": 1}),
        (
            "INSERT INTO events (at, batch_id, item_id, person_id, assignment_id, kind, nonce, body) "
            "SELECT at, batch_id, item_id, person_id, assignment_id, kind, 'new', body FROM events LIMIT 1",
            {"duplicated": 1, "unknown": 1},
        ),
        ("UPDATE batches SET num_people = 1", {"over_assigned": 2}),
    ],
    ids=["gone", "changed", "twice", "too many"],
)
def test_the_comparison_finds_planted_harm(voted, harm: str, found: dict[str, Any]) -> None:
    url, votes = voted
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(harm))
    engine.dispose()
    assert compare(url, votes) == GOOD | found


# --- the known truth ----------------------------------------------------------------------------------------


def test_a_raters_votes_are_as_probable_as_they_are_simulated(tmp_path: Path) -> None:
    """The formula against the rater, whose sides are even; within four standard errors."""
    (item,) = pairs(tmp_path, ["B"])
    files = {slot: Path(path).read_bytes() for slot, (path, _) in item.pictures.items()}
    rng = random.Random(0)
    decide = annotation.rater(0.7, 0.3, rng)
    num, counts = 10_000, {"A": 0, "B": 0, "Tie": 0}
    for number in range(num):
        left, right = "AB" if number % 2 else "BA"
        choice = decide({"left": files[left], "right": files[right]})["choice"]
        counts[{"left": left, "right": right, "tie": "Tie"}[choice]] += 1
    for vote, probability in vote_probabilities(0.7, 0.3, "B").items():
        assert abs(counts[vote] / num - probability) < 4 * (probability * (1 - probability) / num) ** 0.5


def test_the_exact_majority_adds_up_and_is_plain_where_raters_are_perfect(monkeypatch) -> None:
    assert sum(map(majority_probability, ("A", "B", "Tie"))) == pytest.approx(1)
    monkeypatch.setattr(annotation, "RATERS", ((1.0, 0.0),) * 5)
    assert {label: majority_probability(label) for label in annotation.TRUTH} == pytest.approx(
        annotation.TRUTH
    )


def test_wilsons_coverage_is_that_of_the_hits_whose_intervals_hold_it() -> None:
    """At n = 10 the intervals of 2 to 8 hits hold 0.5: that of 1 ends at 0.404, that of 2 at 0.510."""
    assert wilson_coverage(10, 0.5) == pytest.approx(1 - 2 * (1 + 10) / 2**10)


def test_tangos_coverage_is_that_of_the_outcomes_whose_intervals_hold_it() -> None:
    """Against scipy's multinomial distribution, and with every interval as wide as can be."""
    win, lose, num, total = 0.6, 0.3, 6, 0.0
    for wins, losses in ((a, b) for a in range(num + 1) for b in range(num + 1 - a)):
        low, high = tango_ci95(wins / num, losses / num, num)
        chance = multinomial.pmf([wins, losses, num - wins - losses], num, [win, lose, 1 - win - lose])
        total += chance * (low <= win - lose <= high)
    assert tango_coverage(num, win, lose) == pytest.approx(total) and 0.9 < total < 1


def test_pages_are_pictured_with_work_of_every_question_in_them(tmp_path: Path, in_tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'votes.db'}")
    batches = annotation_pages.fill_with_work(store, tmp_path)
    assert set(batches) == set(QUESTIONS)
    assert all(0 < store.progress(one).done < store.progress(one).total for one in batches.values())
    assert store.standing(batches["photography"]).num_disputed > 0
    store.close()


@pytest.mark.slow
@pytest.mark.smoke
def test_votes_of_known_raters_lead_back_to_the_truth(tmp_path: Path) -> None:
    """A few runs through the real server."""
    found = annotation.coverage(tmp_path, runs=6, prompts=12, teams=2)["coverage"]
    assert found["votes"] == 6 * 12 * 5
    # six means of 12 prompts; within four standard errors of the exact probability
    assert abs(found["mean_estimate"] - found["truth"]) < 4 * (0.25 / 72) ** 0.5
    difference = found["win_minus_lose_mean_estimate"] - found["win_minus_lose_truth"]
    assert abs(difference) < 4 * (1 / 72) ** 0.5
    assert found["win_minus_lose_expected"] > 0.94


def test_what_is_not_here_is_said(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(annotation, "load_on", lambda *_: {"votes": 1})

    def nothing():
        raise annotation.NotHere("PostgreSQL is not installed")

    monkeypatch.setattr(annotation, "postgresql", nothing)
    found = annotation.load(tmp_path, 1, 1, 0)
    assert found == {
        "load": {"sqlite": {"votes": 1}, "postgresql": {"not_run": "PostgreSQL is not installed"}}
    }


def test_a_part_keeps_the_figures_of_others(in_tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(annotation, "attacks", lambda folder: {"attacks": {"tried": 3, "refused": 3}})
    Path("out").mkdir()
    Path("out/results.json").write_text(json.dumps({"load": 1, "about": {"load": {}}}))
    annotation.main(["--out", "out", "--parts", "attacks", "--runs", "7"])
    results = json.loads(Path("out/results.json").read_text())
    assert results["load"] == 1 and results["attacks"]["tried"] == 3
    assert (
        results["about"]["attacks"]["command"] == "python -m benchmarks.annotation --parts attacks --runs=7"
    )
