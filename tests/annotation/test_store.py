"""The store against its own log, against plain counting, under threads, and under a kill."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emu_lightning.annotation.store import (
    Assignment,
    Batch,
    GivenAnswer,
    NewItem,
    Person,
    Receipt,
    Refused,
    Store,
)
from emu_lightning.evaluation.agreement import rating_agreement
from tests.annotation.conftest import Clock, MakeItems

ANSWERS: dict[str, dict[str, Any]] = {
    "screening": {"choice": "keep"},
    "photography": {
        **dict.fromkeys(("composition", "lighting", "colour", "subject", "story"), 1),
        "accept": True,
    },
    "caption": {"text": "A fox."},
    "verification": {"verdict": "accept"},
    "appeal": {"choice": "left"},
    "faithfulness": {"choice": "both"},
}
NONCES = itertools.count()


def give(store: Store, person: Person, lent: Assignment, answer: dict[str, Any], **fields: Any) -> Receipt:
    return store.answer(
        person,
        lent.token,
        answer,
        **{
            "nonce": f"nonce-{next(NONCES)}",
            "seen": dict.fromkeys(lent.sides, True),
            "times": {"shown_at": 10.0, "submitted_at": 12.0},
            **fields,
        },
    )


def refuses(status: int, words: str = "[a-z]") -> Any:
    class Context:
        def __enter__(self) -> None:
            self.raises = pytest.raises(Refused, match=words)
            self.error = self.raises.__enter__()

        def __exit__(self, *args: Any) -> bool:
            caught = self.raises.__exit__(*args)
            assert self.error.value.status == status
            assert "\n" not in self.error.value.message
            return bool(caught)

    return Context()


def people(store: Store, num: int, role: Any = "generalist") -> list[Person]:
    return [store.add_person(f"{role} {index}", role) for index in range(num)]


def check_books(store: Store, batch: Batch) -> None:
    """Counts kept beside the items against the log, read in another way than the store reads it."""
    state: dict[int, str] = {}
    counted: Counter[str] = Counter()
    for event in store.events(batch):
        if event.kind == "answer":
            assert state.get(event.assignment_id or 0) != "answered", "an assignment was answered twice"
            state[event.assignment_id or 0] = "answered"
            counted[event.item] += 1
        elif event.kind == "undo":
            assert state[event.assignment_id or 0] == "answered"
            state[event.assignment_id or 0] = "undone"
            counted[event.item] -= 1
    for item in store.items(batch):
        if item.gold is None:
            assert item.num_done == counted[item.name]
            assert item.num_done <= item.num_taken <= item.num_wanted
    asked = [(one.item.id, one.person.id) for one in store.answers(batch)]
    assert len(asked) == len(set(asked)) == sum(counted.values())


# --- lending ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ANSWERS)
def test_everyone_together_finish_a_batch(store: Store, question: str, make_items: MakeItems) -> None:
    batch = store.add_batch(question, "First", num_people=2)
    store.add_items(batch, make_items(batch, 5))
    three = people(store, 3, batch.asks.roles[-1])
    given = 0
    for person in itertools.cycle(three):
        lent = store.lend(person, batch, 1)
        if not lent:
            break
        give(store, person, lent[0], ANSWERS[question])
        given += 1
    assert given == 10
    assert all(store.lend(person, batch, 20) == [] for person in three)
    assert {item.num_done for item in store.items(batch)} == {2}
    check_books(store, batch)


def test_what_is_lent_stays_lent_and_is_topped_up(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1)
    store.add_items(batch, make_items(batch, 9))
    one, two = people(store, 2)
    first = store.lend(one, batch, 3)
    assert [lent.token for lent in store.lend(one, batch, 3)] == [lent.token for lent in first]
    assert [lent.token for lent in store.lend(one, batch, 5)][:3] == [lent.token for lent in first]
    assert len(store.lend(one, batch, 2)) == 2
    others = store.lend(two, batch, 20)
    assert len(others) == 4
    assert not {lent.item.id for lent in others} & {lent.item.id for lent in store.lend(one, batch, 20)}
    tokens = {lent.token for lent in (*others, *store.lend(one, batch, 20))}
    assert len(tokens) == 9 and all(len(token) >= 24 for token in tokens)


def test_a_role_and_a_closed_batch_are_refused(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("photography", "Review")
    store.add_items(batch, make_items(batch, 1))
    with refuses(403, "generalist"):
        store.lend(people(store, 1)[0], batch, 1)
    [person] = people(store, 1, "specialist")
    [lent] = store.lend(person, batch, 1)
    store.set_open(batch, False)
    with refuses(409, "closed"):
        store.lend(person, batch, 1)
    with refuses(409, "closed"):
        give(store, person, lent, ANSWERS["photography"])
    with refuses(409, "closed"):
        store.undo(person, batch)
    store.set_open(batch, True)
    give(store, person, lent, ANSWERS["photography"])


def test_the_writer_of_a_caption_is_not_asked_about_it(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("verification", "Check")
    writer, other = people(store, 2)
    store.add_items(batch, make_items(batch, 3, author=writer.id))
    assert store.lend(writer, batch, 5) == []
    assert len(store.lend(other, batch, 5)) == 3


def test_what_is_lent_names_no_model_and_no_known_answer(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", settings={"gold_every": 1})
    store.add_items(batch, make_items(batch, 2, gold={"choice": "A"}))
    lent = store.lend(people(store, 1)[0], batch, 2)
    assert len(lent) == 2
    assert all(one.item.models == {} and one.item.gold is None for one in lent)
    assert store.item(batch, lent[0].item.id).models == {}
    exported = store.items(batch)
    assert exported[0].models == {"A": "model-A", "B": "model-B"} and exported[0].gold == {"choice": "A"}


def test_an_ended_lease_is_given_to_the_next(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1, settings={"lease_seconds": 60})
    store.add_items(batch, make_items(batch, 1))
    one, two, three = people(store, 3)
    [slow] = store.lend(one, batch, 1)
    clock.now += 60 - 1e-3
    assert store.lend(two, batch, 1) == []
    clock.now += 1
    [taken] = store.lend(two, batch, 1)
    assert taken.item.id == slow.item.id and taken.token != slow.token
    with refuses(409, "someone else"):
        give(store, one, slow, {"choice": "left"})
    with refuses(404):
        store.picture(one, slow.token, "left")
    assert store.lend(one, batch, 1) == []
    give(store, two, taken, {"choice": "left"})
    assert store.lend(three, batch, 1) == []
    check_books(store, batch)


def test_a_late_answer_counts_while_its_place_is_free(
    store: Store, clock: Clock, make_items: MakeItems
) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=2, settings={"lease_seconds": 60})
    store.add_items(batch, make_items(batch, 1))
    one, two, three = people(store, 3)
    [first], [second] = store.lend(one, batch, 1), store.lend(two, batch, 1)
    clock.now += 1000
    give(store, one, first, {"choice": "left"})  # late, but nobody else was asked
    [third] = store.lend(three, batch, 1)  # takes the place of the second
    with refuses(409, "someone else"):
        give(store, two, second, {"choice": "left"})
    clock.now += 1000
    give(store, three, third, {"choice": "right"})
    check_books(store, batch)


def test_of_two_ended_leases_one_place_stays_free(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=2, settings={"lease_seconds": 60})
    store.add_items(batch, make_items(batch, 1))
    one, two, three = people(store, 3)
    [first], [second] = store.lend(one, batch, 1), store.lend(two, batch, 1)
    clock.now += 1000
    [third] = store.lend(three, batch, 1)
    give(store, two, second, {"choice": "left"})  # of the two places only one was given away
    with refuses(409, "someone else"):
        give(store, one, first, {"choice": "left"})
    give(store, three, third, {"choice": "left"})
    check_books(store, batch)


def test_a_lost_place_that_is_free_again_comes_back_unchanged(
    store: Store, clock: Clock, make_items: MakeItems
) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1, settings={"lease_seconds": 60})
    store.add_items(batch, make_items(batch, 1))
    one, two = people(store, 2)
    [first] = store.lend(one, batch, 1)
    clock.now += 100
    store.lend(two, batch, 1)
    clock.now += 100
    [again] = store.lend(one, batch, 1)
    assert (again.token, again.left_slot) == (first.token, first.left_slot)
    give(store, one, again, {"choice": "left"})
    check_books(store, batch)


def test_lending_again_renews_the_lease(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1, settings={"lease_seconds": 60})
    store.add_items(batch, make_items(batch, 1))
    one, two = people(store, 2)
    for _ in range(3):  # even after its end, as long as the place is theirs
        [lent] = store.lend(one, batch, 1)
        assert lent.lease_expires == clock.now + 60
        clock.now += 70
    clock.now -= 20
    assert store.lend(two, batch, 1) == []


# --- sides and known answers ------------------------------------------------------------------------------


def test_each_four_pairs_have_two_with_a_on_the_left(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=3)
    store.add_items(batch, make_items(batch, 24))
    orders = Counter[str]()
    for person in people(store, 3):
        lefts: list[str] = []
        while lent := store.lend(person, batch, 1 + len(lefts) % 3):  # however many at a time
            for one in lent:
                lefts.append(one.left_slot)
                assert one.sides == {"left": one.left_slot, "right": "BA"[one.left_slot == "B"]}
                give(store, person, one, {"choice": "left"})
        blocks = ["".join(lefts[start : start + 4]) for start in range(0, 24, 4)]
        assert all(Counter(block) == {"A": 2, "B": 2} for block in blocks)
        orders.update(blocks)
    assert len(orders) >= 3  # of six; the chance of fewer in 18 blocks is below 15 / 3^18


def test_one_item_of_each_block_has_a_known_answer(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("screening", "Screen", num_people=2, settings={"gold_every": 5})
    store.add_items(batch, make_items(batch, 26))
    gold = [
        NewItem(f"gold-{index}", item.pictures, gold={"choice": "keep"})
        for index, item in enumerate(make_items(batch, 6))
    ]
    store.add_items(batch, gold)
    places = Counter[int]()
    for person in people(store, 2):
        given: list[bool] = []
        while lent := store.lend(person, batch, 3):
            for one in lent:
                given.append(one.item.name.startswith("gold"))
                give(store, person, one, {"choice": "keep"})
        assert len(given) == 32  # all 26, and every known answer although the other person had it too
        blocks = [given[start : start + 5] for start in range(0, 30, 5)]
        assert all(sum(block) == 1 for block in blocks)
        places.update(block.index(True) for block in blocks)
    assert len(places) >= 2  # not always at the same place
    progress = store.progress(batch, person)
    assert (progress.done, progress.total, progress.mine) == (52, 52, 32)
    check_books(store, batch)


def test_known_answers_are_off_where_the_batch_says_so(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("screening", "Screen", settings={"gold_every": 0})
    store.add_items(batch, make_items(batch, 3, gold={"choice": "keep"}))
    assert store.lend(people(store, 1)[0], batch, 3) == []


# --- answering --------------------------------------------------------------------------------------------


def test_an_answer_is_kept_in_slots_with_what_was_shown(
    store: Store, clock: Clock, make_items: MakeItems
) -> None:
    batch = store.add_batch("faithfulness", "Pairs", num_people=4)
    store.add_items(batch, make_items(batch, 8))
    [person] = people(store, 1)
    lent = {one.item.name: one for one in store.lend(person, batch, 8)}
    times = {"shown_at": 1.25, "loaded_at": {"left": 1.0}, "first_input_at": None, "submitted_at": 2.5}
    for one in lent.values():
        client = {"viewport": [400, 800], "ui_version": "1"}
        receipt = give(store, person, one, {"choice": "right"}, times=times, client=client)
        assert not receipt.is_repeat and receipt.at == clock.now
    answers = store.answers(batch)
    assert len(answers) == 8
    for answer in answers:
        assert answer.left_slot == lent[answer.item.name].left_slot
        assert answer.answer == {"choice": "B" if answer.left_slot == "A" else "A"}
        assert answer.times == times and answer.person == person and answer.guideline_version == 1
    assert store.events(batch)[0].body["client"] == {"viewport": [400, 800], "ui_version": "1"}


def test_the_same_nonce_changes_nothing(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs")
    store.add_items(batch, make_items(batch, 2))
    one, two = people(store, 2)
    first, second = store.lend(one, batch, 2)
    receipt = give(store, one, first, {"choice": "left"}, nonce="n-1")
    clock.now += 5
    again = give(store, one, first, {"choice": "right"}, nonce="n-1", seen={})
    assert (again.event_id, again.at, again.is_repeat) == (receipt.event_id, receipt.at, True)
    with refuses(409, "already"):
        give(store, one, first, {"choice": "left"}, nonce="n-2")
    with refuses(409, "nonce"):
        give(store, one, second, {"choice": "left"}, nonce="n-1")
    [other] = store.lend(two, batch, 1)
    with refuses(409, "nonce"):
        give(store, two, other, {"choice": "left"}, nonce="n-1")
    store.undo(one, batch)
    assert give(store, one, first, {"choice": "left"}, nonce="n-1").is_repeat  # a retry that comes late
    assert store.answers(batch) == []
    store.set_open(batch, False)
    assert give(store, one, first, {"choice": "left"}, nonce="n-1").is_repeat
    check_books(store, batch)


@pytest.mark.parametrize(
    "token", ["", "unknown", "a/../b", "a\x00b", "\ud800", "x" * 500, "'; drop table people"]
)
def test_an_unknown_token_is_refused(store: Store, make_items: MakeItems, token: str) -> None:
    [person] = people(store, 1)
    with refuses(404):
        store.answer(person, token, {"choice": "left"}, "n", {}, {})
    with refuses(404):
        store.picture(person, token, "left")
    with refuses(404):
        store.batch(token)


def test_another_persons_item_is_refused(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs")
    store.add_items(batch, make_items(batch, 1))
    one, two = people(store, 2)
    [lent] = store.lend(one, batch, 1)
    with refuses(404):
        give(store, two, lent, {"choice": "left"})
    with refuses(404):
        store.picture(two, lent.token, "left")
    assert store.picture(one, lent.token, "left") == lent.item.pictures[lent.sides["left"]]
    for side in ("only", "up", "", "A"):
        with refuses(404):
            store.picture(one, lent.token, side)


def test_an_answer_without_sight_or_sense_is_refused_and_the_item_stays(
    store: Store, make_items: MakeItems
) -> None:
    batch = store.add_batch("appeal", "Pairs")
    store.add_items(batch, make_items(batch, 1))
    [person] = people(store, 1)
    [lent] = store.lend(person, batch, 1)
    for seen in ({}, {"left": True}, {"left": True, "right": False}, {"only": True}):
        with refuses(422, "every picture"):
            give(store, person, lent, {"choice": "left"}, seen=seen)
    with refuses(422, "choice"):
        give(store, person, lent, {"choice": "A"})
    for nonce in ("", "x" * 65, "a b", "a\x00"):
        with refuses(422, "nonce"):
            give(store, person, lent, {"choice": "left"}, nonce=nonce)
    assert store.events(batch) == []
    give(store, person, lent, {"choice": "left"})


# --- further people, undo, decisions ----------------------------------------------------------------------


def answer_all(store: Store, batch: Batch, given: list[tuple[Person, str]]) -> None:
    for person, choice in given:
        [lent] = store.lend(person, batch, 1)
        sides = {slot: side for side, slot in lent.sides.items()}
        give(store, person, lent, {"choice": sides.get(choice, choice)})  # type: ignore[call-overload]


def test_a_split_at_screening_brings_in_a_third(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("screening", "Screen")
    store.add_items(batch, make_items(batch, 1))
    one, two, three, four = people(store, 4)
    answer_all(store, batch, [(one, "keep"), (two, "reject")])
    assert store.progress(batch).total == 3
    answer_all(store, batch, [(three, "reject")])
    assert store.lend(four, batch, 1) == []
    assert store.progress(batch).done == 3
    check_books(store, batch)


def test_pairs_without_a_majority_bring_in_more_only_where_the_batch_asks(
    store: Store, make_items: MakeItems
) -> None:
    six = people(store, 6)
    for extra_rater, num_wanted in ((False, 3), (True, 5)):
        settings = {"extra_rater": extra_rater}
        batch = store.add_batch("faithfulness", "Pairs", settings=settings)
        store.add_items(batch, make_items(batch, 1))
        answer_all(store, batch, list(zip(six, ["A", "B", "both"], strict=False)))
        assert store.items(batch)[0].num_wanted == num_wanted
        assert len(store.lend(six[3], batch, 1)) == int(extra_rater)


def test_undo_lends_the_item_again_with_the_old_answer(
    store: Store, clock: Clock, make_items: MakeItems
) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1, settings={"undo_seconds": 600})
    store.add_items(batch, make_items(batch, 3))
    one, two = people(store, 2)
    with refuses(409, "take back"):
        store.undo(one, batch)
    first, second, _ = store.lend(one, batch, 3)
    give(store, one, first, {"choice": "left"})
    clock.now += 10
    give(store, one, second, {"choice": "right"})
    with refuses(409):
        store.undo(two, batch)

    back = store.undo(one, batch)
    assert (back.token, back.previous, back.state) == (second.token, {"choice": "right"}, "lent")
    assert back.lease_expires == clock.now + 900
    assert store.lend(two, batch, 3) == []  # the place stays theirs
    assert [lent.previous for lent in store.lend(one, batch, 3)] == [{"choice": "right"}, None]
    assert len(store.answers(batch)) == 1
    assert store.undo(one, batch).token == first.token  # and the one before
    check_books(store, batch)

    give(store, one, second, {"choice": "tie"})
    give(store, one, first, {"choice": "tie"})
    assert [answer.answer for answer in store.answers(batch)] == [{"choice": "Tie"}] * 2
    assert [event.kind for event in store.events(batch)] == ["answer"] * 2 + ["undo"] * 2 + ["answer"] * 2
    assert store.undo(one, batch).previous == {"choice": "tie"}  # the latest, not the first again
    clock.now += 601
    with refuses(409, "take back"):
        store.undo(one, batch)
    check_books(store, batch)


def test_undo_of_a_split_never_wants_fewer_than_were_asked(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("screening", "Screen")
    store.add_items(batch, make_items(batch, 1))
    one, two, three = people(store, 3)
    answer_all(store, batch, [(one, "keep"), (two, "reject")])
    store.undo(two, batch)
    assert store.progress(batch).total == 2  # nobody was asked as a third
    assert store.lend(three, batch, 1) == []
    answer_all(store, batch, [(two, "reject")])
    [third] = store.lend(three, batch, 1)
    store.undo(two, batch)
    assert store.items(batch)[0].num_wanted == 3
    answer_all(store, batch, [(two, "keep")])
    give(store, three, third, {"choice": "keep"})
    check_books(store, batch)


def test_a_lead_decides_what_specialists_dispute(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("photography", "Review")
    store.add_items(batch, make_items(batch, 3))
    one, two = people(store, 2, "specialist")
    [lead] = people(store, 1, "lead")
    accept = ANSWERS["photography"]
    reject = {**accept, "accept": False}
    for person, verdicts in ((one, "yyy"), (two, "yn")):
        lent = {item.item.name: item for item in store.lend(person, batch, 3)}
        for name, verdict in zip(sorted(lent), verdicts, strict=False):
            give(store, person, lent[name], accept if verdict == "y" else reject)
    [disputed] = store.to_adjudicate(batch)
    opinions = store.answers_to(batch, disputed)
    item = opinions[0].item
    assert item.name == "item-1" and store.standing(batch).num_disputed == 1
    assert [answer.answer["accept"] for answer in opinions] == [True, False]
    agreed = next(item for item in store.items(batch) if item.name == "item-0")
    with refuses(409, "disagree"):
        store.adjudicate(lead, agreed, reject)
    with refuses(403):
        store.adjudicate(one, item, reject)
    with refuses(422, "story"):
        store.adjudicate(lead, item, {**reject, "story": 7})
    store.adjudicate(lead, item, reject)
    assert store.to_adjudicate(batch) == []
    store.adjudicate(lead, item, accept)  # a second thought
    [decision] = store.adjudications(batch)
    assert decision.person == lead and decision.answer["accept"] is True
    assert len(store.answers(batch)) == 5  # a decision is no vote
    check_books(store, batch)


def test_answers_given_elsewhere(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=1)
    store.add_items(batch, make_items(batch, 2))
    items = store.items(batch)
    one, two = people(store, 2)
    [lent] = store.lend(one, batch, 1)

    def bring(*given: Any, **fields: Any) -> int:
        return store.import_answers(batch, [GivenAnswer(*given, **fields)])

    other = next(item for item in items if item.id != lent.item.id)
    assert not bring(lent.item, one.id, {"choice": "A"})  # was asked here
    times = {"shown_at": "noon", "submitted_at": None}
    assert bring(other, one.id, {"choice": "A"}, left_slot="B", at=5.0, times=times)
    assert not bring(other, one.id, {"choice": "B"})
    assert bring(other, two.id, {"choice": "Tie"})  # one more than was wanted
    assert store.lend(two, batch, 2) == []
    first, second = store.answers(batch)
    assert (first.answer, first.left_slot, first.at, first.times) == ({"choice": "A"}, "B", 5.0, times)
    assert (second.answer, second.at, second.guideline_version) == ({"choice": "Tie"}, clock.now, 1)
    assert store.answers(batch, two) == [second]
    assert store.events(batch)[0].body["client"] == {"imported": True}
    assert store.standing(batch).people[0].median_seconds is None
    check_books(store, batch)
    for answer in ({"choice": "left"}, {"choice": "both"}, {}, {"choice": []}):
        with pytest.raises(ValueError, match=other.name):
            bring(other, two.id, answer)
    for fields in ({"kind": "undo"}, {"left_slot": "C"}, {"at": math.nan}, {"times": {"shown_at": math.inf}}):
        with pytest.raises(ValueError, match=lent.item.name):
            bring(lent.item, two.id, {"choice": "A"}, **fields)
    assert len(store.events(batch)) == 2


def test_decisions_made_elsewhere(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("photography", "Review")
    store.add_items(batch, make_items(batch, 1))
    [item], [lead] = store.items(batch), people(store, 1, "lead")

    def bring(*given: Any, **fields: Any) -> int:
        return store.import_answers(batch, [GivenAnswer(*given, **fields)])

    given = {**ANSWERS["photography"], "reasons": [], "comment": ""}
    assert bring(item, lead.id, given, kind="adjudicate")
    assert not bring(item, lead.id, given, kind="adjudicate")
    assert bring(item, lead.id, {**given, "accept": False}, kind="adjudicate")
    [decision] = store.adjudications(batch)
    assert decision.answer["accept"] is False and store.answers(batch) == []


def test_answers_name_the_guideline_that_was_shown(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", guideline="Look well.")
    store.add_items(batch, make_items(batch, 3))
    [person] = people(store, 1)
    [first] = store.lend(person, batch, 1)
    assert store.guideline(batch) == (1, "Look well.")
    assert store.add_guideline(batch, "Look better.") == 2
    give(store, person, first, {"choice": "left"})
    [second] = store.lend(person, batch, 1)
    give(store, person, second, {"choice": "left"})
    assert [answer.guideline_version for answer in store.answers(batch)] == [1, 2]
    assert store.guideline(batch) == (2, "Look better.")


# --- what came of it --------------------------------------------------------------------------------------


def test_time_left_is_the_recent_pace(store: Store, clock: Clock, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=2)
    store.add_items(batch, make_items(batch, 10))
    [person] = people(store, 1)
    assert store.progress(batch).seconds_left is None
    for lent in store.lend(person, batch, 10):
        give(store, person, lent, {"choice": "left"})
        clock.now += 6
    progress = store.progress(batch, person)
    assert (progress.done, progress.total, progress.mine) == (10, 20, 10)
    assert progress.seconds_left == pytest.approx(60)  # ten answers, six seconds each
    clock.now += 3600
    assert store.progress(batch).seconds_left is None  # nobody is at work


def test_standing_against_counting_by_hand(store: Store, make_items: MakeItems) -> None:
    """Item 0: A A B; item 1: B B; item 2: a tie alone. Pairs that agree: 1 of 3, and 1 of 1."""
    batch = store.add_batch("appeal", "Pairs", num_people=3, settings={"gold_every": 4})
    store.add_items(batch, make_items(batch, 4))
    pictures = make_items(batch, 1)[0].pictures
    store.add_items(batch, [NewItem("known", pictures, gold={"choice": "B"})])
    choices = {
        0: {"item-0": "A", "item-1": "B", "item-2": "Tie", "known": "B"},
        1: {"item-0": "A", "item-1": "B", "known": "A"},
        2: {"item-0": "B"},
    }
    lefts = Counter[int]()
    for index, person in enumerate(people(store, 3)):
        for lent in store.lend(person, batch, 5):  # four, and the known one among the first four
            if lent.item.name in choices[index]:
                choice = choices[index][lent.item.name]
                sides = {"A": "left", "B": "right"} if lent.left_slot == "A" else {"A": "right", "B": "left"}
                lefts[index] += sides.get(choice) == "left"
                times = {"shown_at": 100.0, "submitted_at": 101.0 + index}
                give(store, person, lent, {"choice": sides.get(choice, "tie")}, times=times)
    standing = store.standing(batch)
    assert standing.num_answers == 6
    assert standing.raw_agreement == pytest.approx(2 / 4)
    # Coincidences by hand: o_AA = 1, o_AB = o_BA = 1, o_BB = 2; n_A = 2, n_B = 3, n = 5.
    assert standing.alpha == pytest.approx(1 - (2 / 5) / (2 * 2 * 3 / (5 * 4)))
    assert standing.options == {"A": 2, "B": 3, "Tie": 1}
    by_name = {one.person.name: one for one in standing.people}
    first, second, third = (by_name[f"generalist {index}"] for index in range(3))
    assert (first.num_answers, first.num_gold, first.num_gold_right) == (3, 1, 1)
    assert (second.num_answers, second.num_gold, second.num_gold_right) == (2, 1, 0)
    assert (third.num_answers, third.num_gold, third.median_seconds) == (1, 0, 3.0)
    assert (first.num_sided, second.num_sided) == (3, 3)  # the tie is on no side
    assert first.share_left == lefts[0] / 3 and second.share_left == lefts[1] / 3


@pytest.mark.parametrize("question", ["appeal", "photography", "screening"])
def test_a_standing_kept_up_to_date_is_that_of_the_whole_log(
    store: Store, database_url: str, clock: Clock, make_items: MakeItems, question: str
) -> None:
    """Answers and undone ones at random; after each few, against a store that reads all anew, and by hand."""
    batch = store.add_batch(question, "Some", num_people=3, settings={"gold_every": 3})
    store.add_items(batch, make_items(batch, 6))
    known = {"appeal": {"choice": "A"}, "photography": {"accept": True}, "screening": {"choice": "keep"}}
    picture = make_items(batch, 1)[0].pictures
    store.add_items(batch, [NewItem(f"known-{n}", picture, gold=known[question]) for n in range(2)])
    rng, crew = random.Random(0), people(store, 4, batch.asks.roles[-1])
    [lead] = people(store, 1, "lead")
    options = list(batch.asks.options)
    for step in range(40):
        person, clock.now = rng.choice(crew), clock.now + 1
        if rng.random() < 0.3:
            with suppress(Refused):
                store.undo(person, batch)
        for lent in store.lend(person, batch, 1):
            option = rng.choice(options)
            answer = {"choice": option}
            if question == "photography":
                answer = {**ANSWERS[question], "accept": option == "accept"}
            times = {"shown_at": clock.now - 5 * rng.random(), "submitted_at": clock.now}
            give(store, person, lent, answer, times=times)
        if step % 9 == 8 and (disputed := store.to_adjudicate(batch)):
            store.adjudicate(lead, store.item(batch, disputed[0]), {**ANSWERS[question], "accept": True})
        if step % 4 == 0:
            other = Store(database_url, clock)
            assert store.standing(batch) == other.standing(batch)
            assert store.to_adjudicate(batch) == other.to_adjudicate(batch)
            other.close()
    given = store.answers(batch)
    votes = [(one.item.id, one.person.id, batch.asks.vote(one.answer)) for one in given if not one.is_gold]
    agreement, standing = rating_agreement(votes), store.standing(batch)
    assert len(votes) > 12 and standing.num_answers == len(votes)
    assert (standing.raw_agreement, standing.alpha) == (
        pytest.approx(agreement.raw),
        pytest.approx(agreement.alpha),
    )
    for one in standing.people:
        spans = [each.times for each in given if each.person == one.person]
        seconds = statistics.median(span["submitted_at"] - span["shown_at"] for span in spans)
        assert one.median_seconds == pytest.approx(seconds)
        assert one.num_answers + one.num_gold == len(spans)


def test_a_standing_takes_in_what_was_written_late_under_an_early_number(
    sqlite_store: Store, tmp_path: Path, make_items: MakeItems
) -> None:
    """As two writers to PostgreSQL may: the event of the lower id is committed after the other was read."""
    batch = sqlite_store.add_batch("appeal", "Pairs", num_people=1)
    sqlite_store.add_items(batch, make_items(batch, 2))
    [person] = people(sqlite_store, 1)
    for lent in sqlite_store.lend(person, batch, 2):
        give(sqlite_store, person, lent, {"choice": "tie"})
    file = sqlite3.connect(tmp_path / "votes.db", isolation_level=None)
    first = file.execute("SELECT * FROM events ORDER BY id LIMIT 1").fetchone()
    file.execute("DELETE FROM events WHERE id = ?", first[:1])
    assert sqlite_store.standing(batch).num_answers == 1
    file.execute(f"INSERT INTO events VALUES ({', '.join('?' * len(first))})", first)
    file.close()
    assert sqlite_store.standing(batch).num_answers == 2


def test_an_empty_batch_has_a_standing(store: Store) -> None:
    standing = store.standing(store.add_batch("caption", "Write"))
    assert (standing.num_answers, standing.raw_agreement, standing.alpha) == (0, None, None)
    assert standing.people == []


# --- items ------------------------------------------------------------------------------------------------


def test_adding_items_again_adds_the_missing_ones(store: Store, make_items: MakeItems) -> None:
    batch, other = (store.add_batch("appeal", title) for title in ("One", "Two"))
    assert store.add_items(batch, make_items(batch, 3)) == 3
    assert store.add_items(batch, make_items(batch, 450, extra={"seed": 7, "näme": None})) == 447
    assert store.add_items(batch, make_items(batch, 450)) == 0
    assert store.add_items(other, make_items(other, 2)) == 2
    items = store.items(batch)
    assert len(items) == 450 and len({item.name for item in items}) == 450
    assert {str(item.extra) for item in items} == {"{}", "{'seed': 7, 'näme': None}"}


def test_groups_and_sheets(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("photography", "Review")
    items = make_items(batch, 3, group="fox")
    store.add_items(batch, [*items[:2], NewItem("wolf", items[2].pictures, group="wolf")])
    assert store.groups(batch) == ["fox", "wolf"]
    assert [item.name for item in store.sheet(batch, "fox")] == ["item-0", "item-1"]
    assert store.sheet(batch, "a\x00b") == []


def test_pictures_are_measured_as_they_are_shown(sqlite_store: Store, tmp_path: Path) -> None:
    batch = sqlite_store.add_batch("screening", "Screen")
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.new("RGB", (40, 30)).save(tmp_path / "upright.jpg", exif=exif)
    sqlite_store.add_items(batch, [NewItem("upright", {"A": (tmp_path / "upright.jpg", None)})])
    picture = sqlite_store.items(batch)[0].pictures["A"]
    assert (picture.width, picture.height, picture.media_type) == (30, 40, "image/jpeg")


def test_a_file_that_is_no_picture_is_refused_by_name(sqlite_store: Store, tmp_path: Path) -> None:
    batch = sqlite_store.add_batch("screening", "Screen")

    def add(name: str) -> int:
        return sqlite_store.add_items(batch, [NewItem(name, {"A": (tmp_path / name, None)})])

    (tmp_path / "page.png").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(ValueError, match="page.png is not a picture"):
        add("page.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "scan.tiff")
    with pytest.raises(ValueError, match="scan.tiff is image/tiff"):
        add("scan.tiff")
    with pytest.raises(OSError):
        add("missing.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "fox.png")
    add("fox.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "fox.png")
    with pytest.raises(ValueError, match="has changed"):
        sqlite_store.add_items(batch, [NewItem("again", {"A": (tmp_path / "fox.png", None)})])
    assert [item.name for item in sqlite_store.items(batch)] == ["fox.png"]


@pytest.mark.parametrize(
    ("question", "fields", "words"),
    [
        ("appeal", {"pictures": {"A": ("a.png", None)}}, "A and B"),
        ("screening", {"pictures": {"A": ("a.png", None), "B": ("a.png", None)}}, "needs A"),
        ("faithfulness", {"prompt": None}, "prompt"),
        ("verification", {"caption": None}, "caption"),
        ("appeal", {"gold": {"choice": "left"}}, "gold"),
        ("caption", {"gold": {"text": "x"}}, "gold"),
        ("screening", {"prompt": "a\x00b"}, "plain text"),
        ("screening", {"extra": {"score": math.nan}}, "extra"),
    ],
)
def test_an_item_that_does_not_suit_is_refused(
    sqlite_store: Store, make_items: MakeItems, question: str, fields: dict[str, Any], words: str
) -> None:
    batch = sqlite_store.add_batch(question, "Batch")
    [good] = make_items(batch, 1)
    with pytest.raises(ValueError, match=words):
        sqlite_store.add_items(batch, [NewItem(**{**good.__dict__, **fields})])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"question": "beauty"}, "beauty"),
        ({"num_people": 0}, "num_people"),
        ({"title": " "}, "title"),
        ({"settings": {"lease": 5}}, "lease_seconds"),
        ({"settings": {"lease_seconds": -1}}, "lease_seconds"),
        ({"settings": {"lease_seconds": 0}}, "lease_seconds"),
        ({"settings": {"extra_rater": 1}}, "extra_rater"),
        ({"settings": {"keys": {"a": "left"}}}, "keys"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(sqlite_store: Store, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sqlite_store.add_batch(**{"question": "appeal", "title": "Pairs", **fields})


def test_a_batch_adds_keys_to_those_of_its_question(store: Store) -> None:
    added = store.add_batch("appeal", "Pairs", settings={"keys": {"j": {"choice": "left"}}})
    batch = store.batch(added.public_id)
    assert batch == added and batch in store.batches()
    assert batch.keys == {**batch.asks.keys, "j": {"choice": "left"}}


# --- people -----------------------------------------------------------------------------------------------


def test_passwords(store: Store) -> None:
    person = store.add_person("Zoë", "lead", "correct horse")
    assert store.check_password("Zoë", "correct horse") == person
    assert store.check_password(" Zoë ", "correct horse") == person
    for name, password in [("Zoë", "correct hors"), ("zoë", "correct horse"), ("", ""), ("a\x00", "\ud800")]:
        assert store.check_password(name, password) is None
    store.add_person("no password", "generalist")
    assert store.check_password("no password", "") is None
    store.set_active(person, False)
    assert store.check_password("Zoë", "correct horse") is None
    changed = store.person(person.id)
    assert changed and not changed.is_active and changed.session_version > person.session_version


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "a\nb", "a\x00b", "\u202egnal", "An\u200dn"])
def test_what_is_no_name_is_refused(sqlite_store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        sqlite_store.add_person(name, "lead")
    with pytest.raises(ValueError, match="name"):
        sqlite_store.invite(name, "lead")


def test_a_name_is_one_persons(store: Store) -> None:
    store.add_person("Ann", "lead")
    with pytest.raises(ValueError, match="already"):
        store.add_person("Ann", "generalist")
    with pytest.raises(ValueError, match="is a lead"):
        store.invite("Ann", "generalist")
    with pytest.raises(ValueError, match="role"):
        store.add_person("Bob", "admin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 to"):
        store.add_person("Bob", "lead", "short")
    assert [person.name for person in store.people()] == ["Ann"]


def test_an_invitation_is_good_once(store: Store, clock: Clock) -> None:
    token = store.invite("Ann", "specialist")
    invited = store.invited(token)
    assert invited and (invited.name, invited.role) == ("Ann", "specialist")
    assert store.check_password("Ann", "") is None
    with pytest.raises(ValueError):
        store.accept_invitation(token, "short")
    person = store.accept_invitation(token, "long enough")
    assert person.session_version == invited.session_version + 1
    assert store.check_password("Ann", "long enough") == person
    assert store.invited(token) is None
    for used in (token, "", "unknown", "a\x00\ud800"):
        with refuses(404, "new one"):
            store.accept_invitation(used, "long enough")

    old, new = store.invite("Ann", "specialist"), store.invite("Ann", "specialist")
    assert store.invited(old) is None  # the newer one replaced it
    clock.now += 14 * 24 * 3600 - 1
    assert store.invited(new) is not None
    clock.now += 2
    with refuses(404):
        store.accept_invitation(new, None)


def test_an_invitation_accepted_by_many_lets_one_in(store: Store) -> None:
    token = store.invite("Ann", "specialist")

    def accept(_: int) -> bool:
        try:
            store.accept_invitation(token, None)
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(accept, range(8))) == 1


def test_the_database_is_its_owners(sqlite_store: Store, tmp_path: Path) -> None:
    sqlite_store.add_person("Ann", "lead")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("votes.db*")}
    assert len(modes) == 3 and set(modes.values()) == {0o600}
    with pytest.raises(OSError, match="missing"):
        Store(f"sqlite:///{tmp_path / 'missing' / 'votes.db'}")


def test_many_processes_may_make_the_tables(database_url: str) -> None:
    def start(number: int) -> str:
        store = Store(database_url)
        try:
            return store.add_person(f"person {number}", "lead").name
        finally:
            store.close()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(start, range(4)))) == 4


def test_secrets_are_not_in_the_database(sqlite_store: Store, tmp_path: Path) -> None:
    sqlite_store.add_person("Ann", "lead", "correct horse")
    token = sqlite_store.invite("Bob", "lead")
    sqlite_store.close()
    content = b"".join(path.read_bytes() for path in tmp_path.glob("votes.db*"))
    assert b"Bob" in content and b"$argon2id$" in content
    assert b"correct horse" not in content and token.encode() not in content


def test_refusals_are_kept(store: Store, clock: Clock) -> None:
    [person] = people(store, 1)
    store.log_refusal(person.id, "127.0.0.1", "403 GET /lead", "a\x00\n\ud800" + "x" * 1000)
    clock.now += 1
    store.log_refusal(None, "", "404", "")
    newest, oldest = store.refusals()
    assert (newest.person, newest.at) == (None, clock.now)
    assert (oldest.person, oldest.detail[:5], len(oldest.detail)) == ("generalist 0", "a???x", 500)


# --- many at once, and a kill -----------------------------------------------------------------------------


def test_two_answers_to_one_item_at_once(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs")
    store.add_items(batch, make_items(batch, 8))
    [person] = people(store, 1)
    for number, lent in enumerate(store.lend(person, batch, 8)):
        together = threading.Barrier(6)

        def submit(
            thread: int,
            lent: Assignment = lent,
            number: int = number,
            together: threading.Barrier = together,
        ) -> int | None:
            together.wait()
            nonce = f"{number}-{thread // 3}"  # two answers, each sent three times
            try:
                return give(store, person, lent, {"choice": "left"}, nonce=nonce).event_id
            except Refused as refused:
                assert refused.status == 409
                return None

        with ThreadPoolExecutor(6) as pool:
            receipts = list(pool.map(submit, range(6)))
        assert sorted([receipts[:3].count(None), receipts[3:].count(None)]) == [0, 3]
        assert len(set(receipts) - {None}) == 1
    check_books(store, batch)


def test_one_nonce_for_two_items_at_once(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs")
    store.add_items(batch, make_items(batch, 20))
    [person] = people(store, 1)
    lent = store.lend(person, batch, 20)
    for number, pair in enumerate(zip(lent[::2], lent[1::2], strict=True)):
        together = threading.Barrier(2)

        def submit(one: Assignment, number: int = number, together: threading.Barrier = together) -> int:
            together.wait()
            try:
                give(store, person, one, {"choice": "left"}, nonce=f"same-{number}")
            except Refused as refused:
                return refused.status
            return 200

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(submit, pair)) == [200, 409]


def test_one_person_in_many_windows_draws_nothing_twice(store: Store, make_items: MakeItems) -> None:
    batch = store.add_batch("appeal", "Pairs", num_people=2, settings={"gold_every": 3})
    store.add_items(batch, make_items(batch, 30))
    [person] = people(store, 1)
    with ThreadPoolExecutor(6) as pool:
        windows = list(pool.map(lambda num: store.lend(person, batch, num), [5, 9, 12, 3, 15, 12]))
    everything = store.lend(person, batch, 20)
    assert len(everything) == len({lent.item.id for lent in everything}) == 20
    assert {lent.token for window in windows for lent in window} <= {lent.token for lent in everything}


def in_threads(store: Store, workers: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(worker) for worker in workers]:
            done.result()


def test_many_people_with_leases_that_end_and_answers_taken_back(
    store: Store, clock: Clock, make_items: MakeItems
) -> None:
    """Every transaction moves the clock, so that leases end in the middle of everything."""
    batch = store.add_batch(
        "screening", "Screen", settings={"lease_seconds": 25, "undo_seconds": 1000, "gold_every": 6}
    )
    store.add_items(batch, make_items(batch, 30))
    pictures = make_items(batch, 1)[0].pictures
    store.add_items(
        batch, [NewItem(f"gold-{index}", pictures, gold={"choice": "keep"}) for index in range(3)]
    )
    acknowledged: list[int] = []
    refused = Counter[str]()

    def work(person: Person, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            clock.now += 1
            lent = store.lend(person, batch, rng.randint(1, 4))
            if not lent and store.progress(batch).done == store.progress(batch).total:
                return
            for one in lent[: rng.randint(0, 4)]:
                clock.now += 1
                try:
                    receipt = give(store, person, one, {"choice": rng.choice(["keep", "reject", "unsure"])})
                    acknowledged.append(receipt.event_id)
                except Refused as error:
                    assert error.status == 409
                    refused[error.message] += 1
            if rng.random() < 0.15:
                try:
                    store.undo(person, batch)
                except Refused as error:
                    assert error.status == 409

    in_threads(store, [lambda p=p, s=s: work(p, s) for s, p in enumerate(people(store, 10))])  # type: ignore[misc]
    answered = [event.id for event in store.events(batch) if event.kind == "answer"]
    assert sorted(acknowledged) == sorted(answered) and len(answered) >= 40
    check_books(store, batch)


KILLED = """
import sys
from emu_lightning.annotation.store import Store
store = Store(sys.argv[1])
batch, person = store.batches()[0], store.people()[int(sys.argv[2])]
while lent := store.lend(person, batch, 4):
    for one in lent:
        nonce = one.token
        store.answer(person, one.token, {"choice": "left"}, nonce, {"left": True, "right": True}, {})
        print(nonce, flush=True)
"""


def test_a_kill_loses_no_acknowledged_answer(tmp_path: Path, make_items: MakeItems) -> None:
    """Two processes write to one SQLite file; both are killed in the middle of it."""
    url = f"sqlite:///{tmp_path / 'votes.db'}"
    store = Store(url)
    batch = store.add_batch("appeal", "Pairs", num_people=2)
    store.add_items(batch, make_items(batch, 200))
    two = people(store, 2)
    writers = [
        subprocess.Popen([sys.executable, "-c", KILLED, url, str(index)], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    acknowledged: list[str] = []
    for writer in writers:
        assert writer.stdout is not None
        acknowledged += [writer.stdout.readline().strip() for _ in range(25)]
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    for writer in writers:
        acknowledged += writer.communicate()[0].split()
    store.close()

    store = Store(url)
    nonces = Counter(event.nonce for event in store.events(batch))
    assert all(nonces[nonce] == 1 for nonce in acknowledged if len(nonce) == 32)
    assert max(nonces.values()) == 1 and len(nonces) >= 50
    check_books(store, batch)
    for person in two:  # what was lent at the kill is still lent, and the batch can be finished
        while lent := store.lend(person, batch, 20):
            for one in lent:
                give(store, person, one, {"choice": "tie"})
    assert {item.num_done for item in store.items(batch)} == {2}
    check_books(store, batch)
    store.close()
