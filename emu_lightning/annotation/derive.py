"""What comes of people's answers: decisions about pictures, final captions, and votes between two models.

Everything is derived anew from the answers that count. Items with a known answer decide nothing. A lead's
decision stands in the place of the people's answers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import pyarrow as pa

from emu_lightning.annotation.questions import Answer, Photography
from emu_lightning.annotation.store import Batch, CountedAnswer, Item, Person, Store
from emu_lightning.evaluation import votes
from emu_lightning.evaluation.votes import Judgement


@dataclass(frozen=True)
class Decision:
    """How answers to one question become columns about a picture.

    Attributes:
        columns: name and type.
        make: from the item and the answers that decide, oldest first, at least one.
    """

    columns: Mapping[str, pa.DataType]
    make: Callable[[Item, Sequence[Answer]], dict[str, Any]]


def _screened(item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    """Stage 1 loses as little as it can: only a majority rejects, and unsure is no rejection."""
    counts = Counter(answer["choice"] for answer in answers)
    return {
        "keep": 2 * counts["reject"] <= len(answers),
        **{f"num_{choice}": counts[choice] for choice in ("keep", "unsure", "reject")},
    }


def _reviewed(item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    """Stage 2 takes only what all accept; where they disagree the lead's answer is the only one here."""
    return {
        "accept": all(answer["accept"] for answer in answers),
        **{criterion: fmean(answer[criterion] for answer in answers) for criterion in Photography.criteria},
        "reasons": "; ".join(dict.fromkeys(reason for answer in answers for reason in answer["reasons"])),
    }


def _written(item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    return {"caption": answers[-1]["text"]}


def _verified(item: Item, answers: Sequence[Answer]) -> dict[str, Any]:
    """The last word is the verifier's: the caption as it was, as edited, or none."""
    verdict = answers[-1]["verdict"]
    text = {"accept": item.caption, "edit": answers[-1].get("text"), "reject": None}[verdict]
    return {"caption": text, "caption_verdict": verdict}


DECISIONS: dict[str, Decision] = {
    "screening": Decision(
        {"keep": pa.bool_(), "num_keep": pa.int32(), "num_unsure": pa.int32(), "num_reject": pa.int32()},
        _screened,
    ),
    "photography": Decision(
        {
            "accept": pa.bool_(),
            **dict.fromkeys(Photography.criteria, pa.float64()),
            "reasons": pa.large_string(),
        },
        _reviewed,
    ),
    "caption": Decision({"caption": pa.large_string()}, _written),
    "verification": Decision({"caption": pa.large_string(), "caption_verdict": pa.large_string()}, _verified),
}


def decisions(store: Store, batch: Batch) -> pa.Table:
    """What was decided about each picture, as `emu curate --decisions` reads it: `uid` and the columns.

    A picture that waits for more people, or for the lead, has no row.

    Raises:
        ValueError: the question is about two pictures, so that nothing is decided about one.
    """
    if batch.question not in DECISIONS:
        raise ValueError(f"{batch.title} decides nothing about single pictures: export its votes")
    decision = DECISIONS[batch.question]
    rows = [
        {"uid": item.name, **decision.make(item, answers)} for item, answers in deciding_answers(store, batch)
    ]
    return pa.Table.from_pylist(rows, pa.schema({"uid": pa.large_string(), **decision.columns}))


def deciding_answers(store: Store, batch: Batch) -> list[tuple[Item, list[Answer]]]:
    """The items that are decided, by name, and the answers that decide: the people's, or the lead's alone."""
    given: dict[int, list[CountedAnswer]] = defaultdict(list)
    for counted in store.answers(batch):
        if not counted.is_gold:
            given[counted.item.id].append(counted)
    leads = {counted.item.id: counted.answer for counted in store.adjudications(batch)}
    decided = []
    for item_id, of_item in given.items():
        item, answers = of_item[0].item, [one.answer for one in of_item]
        if item_id in leads:
            decided.append((item, [leads[item_id]]))
        elif not _waits(batch, answers):
            decided.append((item, answers))
    return sorted(decided, key=lambda pair: pair[0].name)


def _waits(batch: Batch, answers: Sequence[Answer]) -> bool:
    wanted = batch.asks.wanted(answers, batch.num_people, batch.settings["extra_rater"])
    return len(answers) < wanted or batch.asks.needs_lead(answers)


def judgements(store: Store, batch: Batch) -> list[Judgement]:
    """The votes between model A and model B, in the order they were given.

    A judgement's prompt is the text; where several items have the same one, the item's name follows, since
    votes on other pictures are other votes. Without a text it is the item's name.

    Raises:
        ValueError: the question is about single pictures, so that nobody voted.
    """
    if batch.asks.num_pictures == 1:
        raise ValueError(f"{batch.title} holds no votes between two models: export its decisions")
    counted = [one for one in store.answers(batch) if not one.is_gold]
    of_prompt = Counter(prompt for _, prompt in {(one.item.id, one.item.prompt) for one in counted})
    return [
        Judgement(
            prompt=_unit(one.item, of_prompt[one.item.prompt]),
            question=cast(votes.Question, batch.question),
            answer=one.answer["choice"],
            rater=pseudonym(one.person),
            rater_kind="person",
            left=one.left_slot,
        )
        for one in counted
    ]


def _unit(item: Item, num_alike: int) -> str:
    if item.prompt is None:
        return item.name
    return item.prompt if num_alike == 1 else f"{item.prompt} [{item.name}]"


def pseudonym(person: Person) -> str:
    """The same person's in every batch of a store; without the store it does not lead back to them."""
    return hashlib.sha256(f"{person.id} {person.created_at!r}".encode()).hexdigest()[:12]
