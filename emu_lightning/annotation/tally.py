"""What the answers of a batch add up to, kept up to date from its log.

A lead looks at a batch often, and a log only grows: each look adds what is new since the last one. Nothing
here is a source of truth; a tally that is thrown away is made again from the log.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emu_lightning.annotation.questions import Answer, Question, Slot
from emu_lightning.evaluation.agreement import LabelCounts, alpha_of_counts, raw_of_counts


@dataclass
class PersonTally:
    """One person's answers that count; ``seconds`` from shown to submitted, in order of size."""

    num_answers: int = 0
    num_left: int = 0
    num_right: int = 0
    num_gold: int = 0
    num_gold_right: int = 0
    seconds: array[float] = field(default_factory=lambda: array("d"))

    @property
    def share_left(self) -> float | None:
        num_sided = self.num_left + self.num_right
        return self.num_left / num_sided if num_sided else None

    @property
    def median_seconds(self) -> float | None:
        if not (num := len(self.seconds)):
            return None
        return (self.seconds[(num - 1) // 2] + self.seconds[num // 2]) / 2


class Tally:
    """Of one batch.

    Attributes:
        last_event: id of the latest event that is in it.
        num_events: how many are in it.
        options: how many answers took each option; items with a known answer are left out.
        people: by id.
        disputed: ids of the finished items whose people disagree and on which no lead has decided.
    """

    def __init__(self, asks: type[Question]) -> None:
        self.asks = asks
        self.last_event = 0
        self.num_events = 0
        self.options: Counter[str] = Counter()
        self.people: dict[int, PersonTally] = defaultdict(PersonTally)
        self.disputed: set[int] = set()
        self._decided: set[int] = set()
        self._votes: dict[int, LabelCounts] = {}
        self._shapes: Counter[LabelCounts] = Counter()
        self._touched: dict[int, tuple[Counter[Any], int]] = {}  # votes, and how many people are wanted

    @property
    def raw_agreement(self) -> float | None:
        return raw_of_counts(self._shapes)

    @property
    def alpha(self) -> float | None:
        return alpha_of_counts(self._shapes)

    def count(
        self,
        change: int,
        item_id: int,
        person_id: int,
        body: Mapping[str, Any],
        gold: Answer | None,
        num_wanted: int,
    ) -> None:
        """Adds an answer (``change`` 1) or takes it out (-1); :meth:`settle` follows.

        Args:
            body: of the answer's event.
            gold: the item's known answer.
            num_wanted: how many people the item wants by now.
        """
        answer, left = body["answer"], body["left_slot"]
        theirs = self.people[person_id]
        self._count_work(change, theirs, answer, left, body["times"])
        if gold is not None:
            theirs.num_gold += change
            theirs.num_gold_right += change * self.asks.matches(answer, gold)
            return
        theirs.num_answers += change
        self.options[self.asks.option(answer)] += change
        if (vote := self.asks.vote(answer)) is not None:
            votes = self._of_item(item_id)
            votes[vote] += change
            self._touched[item_id] = votes, num_wanted

    def _count_work(
        self, change: int, theirs: PersonTally, answer: Answer, left: Slot, times: Mapping[str, Any]
    ) -> None:
        side = self.asks.to_sides(answer, left).get("choice")
        theirs.num_left += change * (side == "left")
        theirs.num_right += change * (side == "right")
        shown, submitted = times.get("shown_at"), times.get("submitted_at")
        if isinstance(shown, int | float) and isinstance(submitted, int | float):
            place = bisect.bisect_left(theirs.seconds, submitted - shown)
            if change > 0:
                theirs.seconds.insert(place, submitted - shown)
            else:
                theirs.seconds.pop(place)

    def decide(self, item_id: int) -> None:
        """A lead has decided on the item."""
        self._decided.add(item_id)
        self.disputed.discard(item_id)

    def _of_item(self, item_id: int) -> Counter[Any]:
        if item_id in self._touched:
            return self._touched[item_id][0]
        return Counter(dict(self._votes.get(item_id, ())))

    def settle(self) -> None:
        """Counts the items anew whose answers have changed."""
        for item_id, (votes, num_wanted) in self._touched.items():
            old, new = self._votes.get(item_id), tuple(sorted((+votes).items()))
            if old is not None:
                self._shapes[old] -= 1
            self._shapes[new] += 1
            self._votes[item_id] = new
            is_finished = votes.total() >= num_wanted and item_id not in self._decided
            if is_finished and self.asks.is_disputed(label for label, _ in new):
                self.disputed.add(item_id)
            else:
                self.disputed.discard(item_id)
        self._touched.clear()
        self._shapes = +self._shapes  # what no item has any more
