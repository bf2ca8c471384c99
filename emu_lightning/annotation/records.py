"""What the store takes and hands out: plain, unchanging records, and the one error it refuses with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu_lightning.annotation.questions import QUESTIONS, Answer, Question, Role, Side, Slot


class Refused(Exception):
    """The request will not be done.

    Attributes:
        status: the HTTP status that says so.
        message: one line for the person.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Person:
    """Someone known; ``invitation_expires`` is the end of an invitation that they have not accepted yet."""

    id: int
    name: str
    role: Role
    is_active: bool
    session_version: int
    created_at: float
    invitation_expires: float | None = None


@dataclass(frozen=True)
class Batch:
    """One pass: a question asked of many items.

    Attributes:
        public_id: what URLs name it by.
        question: the question's name.
        settings: ``lease_seconds``, ``undo_seconds``, ``gold_every`` (one item in so many has a known answer;
            0 for none), ``extra_rater`` (whether a pair without a majority is shown to further people) and
            ``keys`` (added to the question's own).
    """

    id: int
    public_id: str
    question: str
    title: str
    num_people: int
    settings: dict[str, Any]
    is_open: bool
    created_at: float

    @property
    def asks(self) -> type[Question]:
        return QUESTIONS[self.question]

    @property
    def is_compared(self) -> bool:
        """Whether several people's answers to one item agree or not."""
        return self.asks.has_votes and self.num_people > 1

    @property
    def keys(self) -> dict[str, Answer]:
        """``KeyboardEvent.key`` -> the part of an answer it gives."""
        return {**self.asks.keys, **self.settings["keys"]}


@dataclass(frozen=True)
class NewItem:
    """An item to be added.

    Attributes:
        name: stable and unique within the batch: the uid of a picture, the id of a prompt.
        pictures: slot -> (path, name of the model that made it or None); slot A alone, or A and B.
        group: concept or category, for contact sheets.
        gold: a known answer, in slots; the item is then asked of everyone and counts in no result.
        author: id or name of the person who wrote the caption, and is not asked about it.
        extra: whatever else belongs to the item; kept, exported, never shown.
    """

    name: str
    pictures: Mapping[Slot, tuple[str | Path, str | None]]
    prompt: str | None = None
    caption: str | None = None
    group: str | None = None
    gold: Answer | None = None
    author: int | str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A file as it was when it was added; width and height as shown, in pixels."""

    id: int
    path: Path
    sha256: str
    width: int
    height: int
    media_type: str


@dataclass(frozen=True)
class Item:
    """What one answer is about. ``models`` is filled for a lead's export alone, empty elsewhere."""

    id: int
    batch_id: int
    name: str
    group: str | None
    prompt: str | None
    caption: str | None
    author: int | None
    gold: Answer | None
    num_wanted: int
    num_taken: int
    num_done: int
    extra: dict[str, Any]
    pictures: dict[Slot, Picture]
    models: dict[Slot, str | None]


@dataclass(frozen=True)
class Assignment:
    """One item lent to one person.

    Attributes:
        left_slot: what stands on the left.
        previous: the person's own answer that was undone, in sides.
    """

    id: int
    token: str
    item: Item
    person_id: int
    left_slot: Slot
    guideline_version: int
    lease_expires: float
    state: str
    previous: Answer | None

    @property
    def sides(self) -> dict[Side, Slot]:
        return sides(len(self.item.pictures), self.left_slot)


@dataclass(frozen=True)
class Receipt:
    """An answer that is on disk; ``is_repeat`` where it had been before."""

    event_id: int
    batch: Batch
    at: float
    is_repeat: bool


@dataclass(frozen=True)
class Progress:
    """Answers given and wanted, one's own, and the seconds left at the batch's recent pace, None without."""

    done: int
    total: int
    mine: int
    seconds_left: float | None


@dataclass(frozen=True)
class CountedAnswer:
    """An answer that counts, in slots. ``times`` are the browser's, seconds since 1970."""

    item: Item
    person: Person
    answer: Answer
    left_slot: Slot
    at: float
    times: dict[str, Any]
    guideline_version: int
    is_gold: bool


@dataclass(frozen=True)
class GivenAnswer:
    """An answer, in slots, or a lead's decision that was given elsewhere.

    Attributes:
        kind: answer, or adjudicate.
        at: seconds since 1970; the time of the import if None.
        guideline_version: the current one if None.
    """

    item: Item
    person_id: int
    answer: Answer
    kind: str = "answer"
    left_slot: Slot = "A"
    at: float | None = None
    times: Mapping[str, Any] = field(default_factory=dict)
    guideline_version: int | None = None


@dataclass(frozen=True)
class Event:
    """One line of the log. ``person`` and ``item`` are names, ``body`` is as stored."""

    id: int
    at: float
    kind: str
    person: str
    item: str
    assignment_id: int | None
    nonce: str | None
    body: dict[str, Any]


@dataclass(frozen=True)
class PersonStanding:
    """One person's work in a batch. Items with a known answer are left out of ``num_answers``.

    Attributes:
        num_sided: answers that chose a side, known answers too.
        share_left: of the answers that chose a side, those that chose the left one; None without such.
        median_seconds: from shown to submitted.
    """

    person: Person
    num_answers: int
    num_sided: int
    share_left: float | None
    median_seconds: float | None
    num_gold: int
    num_gold_right: int


@dataclass(frozen=True)
class Standing:
    """A batch so far.

    Attributes:
        raw_agreement: share of the pairs of votes on one item that are alike; None without a pair.
        alpha: Krippendorff's, nominal; None where undefined.
        options: how many answers took each option.
        num_disputed: items that wait for a lead's decision.
    """

    num_answers: int
    raw_agreement: float | None
    alpha: float | None
    options: dict[str, int]
    people: list[PersonStanding]
    num_disputed: int = 0


@dataclass(frozen=True)
class Refusal:
    at: float
    person: str | None
    address: str
    what: str
    detail: str


def sides(num_pictures: int, left: Slot) -> dict[Side, Slot]:
    """Which slot stands where."""
    if num_pictures == 1:
        return {"only": "A"}
    return {"left": left, "right": "B" if left == "A" else "A"}
