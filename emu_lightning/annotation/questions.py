"""The questions people are asked: what is shown, what may be answered, how many people it takes.

One class per question, found by its name in :data:`QUESTIONS`; nothing else in the package asks which
question it is. The protocols of photography, appeal and faithfulness follow the paper (arXiv 2309.15807);
the texts, the keys, and what happens when people disagree are ours.

An answer is a dict in one of two forms. A person answers in *sides* ("left"); what is stored names the
*slot* ("A"), so that the answer means the same whichever side the picture was on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal
from unicodedata import category

Answer = dict[str, Any]
Slot = Literal["A", "B"]
Side = Literal["left", "right", "only"]
Role = Literal["generalist", "specialist", "lead"]

LONGEST_CAPTION = 2000
LONGEST_COMMENT = 500

_CONTROLS = {
    "Cc",
    "Cs",
    "Zl",
    "Zp",
}  # controls, halves of surrogate pairs, separators of lines and paragraphs
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Question:
    """What differs from question to question. Never instantiated: a batch names its class.

    Attributes:
        name: what the database stores.
        title: a heading of two or three words.
        sentence: the question as the person reads it.
        guideline: the first version of the batch's guideline, plain paragraphs parted by empty lines.
        template: the page's template.
        roles: who may answer.
        num_pictures: 1, or 2 of one prompt.
        shows_prompt: whether the person sees the prompt the pictures were made from.
        shows_caption: whether the person sees the item's caption.
        has_votes: whether people can give the same answer, so that they agree or not and a right one can be
            known; no two texts are alike.
        num_people: how many people answer about one item where the batch does not say.
        extra_on_split: whether a split among them always brings in further people.
        is_adjudicated: whether a lead decides where they disagree.
        options: the values of the deciding field and the words on their buttons.
        keys: ``KeyboardEvent.key`` -> the part of an answer it gives.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    sentence: ClassVar[str]
    guideline: ClassVar[str]
    template: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    num_pictures: ClassVar[int] = 1
    shows_prompt: ClassVar[bool] = False
    shows_caption: ClassVar[bool] = False
    has_votes: ClassVar[bool] = True
    num_people: ClassVar[int] = 1
    extra_on_split: ClassVar[bool] = False
    is_adjudicated: ClassVar[bool] = False
    options: ClassVar[Mapping[str, str]]
    keys: ClassVar[Mapping[str, Answer]]

    @classmethod
    def check(cls, answer: Answer) -> Answer:
        """The answer as it is kept, still in sides.

        Raises:
            ValueError: the answer is not one; a line saying why.
        """
        raise NotImplementedError

    @classmethod
    def to_slots(cls, answer: Answer, left: Slot) -> Answer:
        """A checked answer in slots, given the slot that was shown on the left."""
        return answer

    @classmethod
    def to_sides(cls, answer: Answer, left: Slot) -> Answer:
        """The inverse of :meth:`to_slots`."""
        return answer

    @classmethod
    def option(cls, answer: Answer) -> str:
        """Which option a stored answer took, for counting."""
        raise NotImplementedError

    @classmethod
    def vote(cls, answer: Answer) -> str | None:
        """What a stored answer weighs in a majority and in agreement; None where there is no such thing."""
        return cls.option(answer)

    @classmethod
    def wanted(cls, answers: Sequence[Answer], num_people: int, extra_rater: bool = False) -> int:
        """How many people an item needs, given its stored answers so far, oldest first.

        Where the first ``num_people`` leave no vote with more than half and the question or the batch asks
        for it, the fewest further people who can still make a majority: a third on 1-1, two more on 2-2-1.
        """
        votes = [cls.vote(answer) for answer in answers[:num_people]]
        if not (cls.extra_on_split or extra_rater) or len(votes) < num_people or None in votes:
            return num_people
        most = max(Counter(votes).values())
        return num_people if 2 * most > num_people else 2 * (num_people - most) + 1

    @classmethod
    def needs_lead(cls, answers: Sequence[Answer]) -> bool:
        """Whether an item with these stored answers waits for a lead's decision."""
        return cls.is_disputed(cls.vote(answer) for answer in answers)

    @classmethod
    def is_disputed(cls, votes: Iterable[str | None]) -> bool:
        """Whether these votes on an item wait for a lead's decision."""
        return cls.is_adjudicated and len(set(votes)) > 1

    @classmethod
    def check_gold(cls, gold: Answer) -> Answer:
        """A known answer, in slots.

        Raises:
            ValueError: no answer could match it.
        """
        raise ValueError(f"{cls.title.lower()} has no known answers: leave gold out")

    @classmethod
    def matches(cls, answer: Answer, gold: Answer) -> bool:
        """Whether a stored answer agrees with a known one in every field the known one has."""
        return all(answer.get(field) == value for field, value in gold.items())


class Choice(Question):
    """One choice among a few, made by one key: ``{"choice": ...}``."""

    @classmethod
    def check(cls, answer: Answer) -> Answer:
        _only(answer, {"choice"})
        return {"choice": _one_of(answer.get("choice"), "choice", cls.options)}

    @classmethod
    def option(cls, answer: Answer) -> str:
        return str(answer["choice"])

    @classmethod
    def check_gold(cls, gold: Answer) -> Answer:
        return cls.check(gold)


class Screening(Choice):
    """Stage 1: generalists look quickly and lose as few good pictures as possible."""

    name = "screening"
    title = "Screening"
    sentence = "Could this be a good picture?"
    guideline = (
        "You are the first to look. Your task is to lose nothing good: keep every picture that an expert "
        "might want to see, and reject only what is plainly poor.\n\n"
        "Reject a picture that is blurred or noisy by accident, badly exposed, crooked without intent, or "
        "whose subject is cut off or cannot be made out. Reject screenshots, collages, frames, logos, "
        "watermarks and text laid over the picture. Reject anything offensive.\n\n"
        "Do not judge whether you like the subject. An everyday subject, well shown, is worth keeping.\n\n"
        "If you hesitate, answer unsure: it counts as keep. A few seconds are enough for most pictures."
    )
    template = "screening.html"
    roles = ("generalist",)
    num_people = 2
    extra_on_split = True
    options = {"reject": "Reject", "unsure": "Unsure", "keep": "Keep"}
    keys = {
        "ArrowLeft": {"choice": "reject"},
        "r": {"choice": "reject"},
        "ArrowRight": {"choice": "keep"},
        "k": {"choice": "keep"},
        "ArrowDown": {"choice": "unsure"},
        "u": {"choice": "unsure"},
    }

    @classmethod
    def vote(cls, answer: Answer) -> str:
        return "reject" if answer["choice"] == "reject" else "keep"

    @classmethod
    def matches(cls, answer: Answer, gold: Answer) -> bool:
        return cls.vote(answer) == cls.vote(gold)


class Photography(Question):
    """Stage 2: specialists accept only the best, by the five criteria of the paper."""

    name = "photography"
    title = "Photography review"
    sentence = "Is this among the best pictures of its subject?"
    guideline = (
        "Accept only what you would show as an example of excellent photography. If in doubt, do not "
        "accept. Give each criterion 0 (fails), 1 (fair) or 2 (excellent), then decide on the whole; a "
        "single failing criterion is usually enough to reject.\n\n"
        "Composition. Look for a considered arrangement, such as the rule of thirds, leading lines, depth "
        "and layers. Reject unbalanced weight, an awkward angle, a hidden subject, or distractions.\n\n"
        "Lighting. Look for light that shapes the scene, with a balanced exposure. Reject flat, dim or "
        "overexposed light.\n\n"
        "Colour and contrast. Look for vivid colours that belong together and strong contrast. Reject a "
        "picture in which one colour dominates, or which is dull or muddy.\n\n"
        "Subject and background. The subject is whole and placed with intent, and stands apart from a "
        "background that is neither cluttered nor empty. Details in front are rendered well.\n\n"
        "Story. Does it tell something or move you? Could the same scene have been captured much better? It "
        "should be among the best you have seen of this subject: the contact sheet shows the others.\n\n"
        "Reasons help the lead where two specialists disagree. Pick those that decided it."
    )
    template = "photography.html"
    roles = ("specialist",)
    num_people = 2
    is_adjudicated = True
    options = {"reject": "Reject", "accept": "Accept"}
    criteria: ClassVar[Mapping[str, str]] = {
        "composition": "Composition",
        "lighting": "Lighting",
        "colour": "Colour and contrast",
        "subject": "Subject and background",
        "story": "Story",
    }
    hints: ClassVar[Mapping[str, str]] = {
        "composition": "arrangement, depth and layers; nothing unbalanced or distracting",
        "lighting": "shapes the scene; balanced, neither flat nor dim nor overexposed",
        "colour": "vivid and in harmony, strong contrast; no single colour dominates",
        "subject": "whole and placed with intent, apart from an uncluttered background",
        "story": "tells something; could hardly be captured better",
    }
    reasons: ClassVar[tuple[str, ...]] = (
        "unbalanced",
        "awkward angle",
        "subject hidden",
        "subject cut off",
        "distractions",
        "flat light",
        "too dark",
        "overexposed",
        "dull colours",
        "one colour dominates",
        "low contrast",
        "cluttered background",
        "empty background",
        "not sharp",
        "overlaid text",
        "tells nothing",
        "seen better",
        "exceptional",
    )
    keys = {
        "ArrowRight": {"accept": True},
        "y": {"accept": True},
        "ArrowLeft": {"accept": False},
        "n": {"accept": False},
    }

    @classmethod
    def check(cls, answer: Answer) -> Answer:
        _only(answer, {*cls.criteria, "accept", "reasons", "comment"})
        points = {criterion: _points(answer.get(criterion), criterion) for criterion in cls.criteria}
        reasons = answer.get("reasons") or []
        if not isinstance(reasons, list) or not all(reason in cls.reasons for reason in reasons):
            raise ValueError(f"reasons must be a list of {', '.join(cls.reasons)}")
        return {
            **points,
            "accept": _yes_or_no(answer.get("accept"), "accept"),
            "reasons": sorted(set(reasons), key=cls.reasons.index),
            "comment": _text(answer.get("comment") or "", "comment", 0, LONGEST_COMMENT),
        }

    @classmethod
    def option(cls, answer: Answer) -> str:
        return "accept" if answer["accept"] else "reject"

    @classmethod
    def check_gold(cls, gold: Answer) -> Answer:
        _only(gold, {*cls.criteria, "accept"})
        _yes_or_no(gold.get("accept"), "accept")
        return {field: value if field == "accept" else _points(value, field) for field, value in gold.items()}


class Caption(Question):
    """Stage 2's pictures get the text they are tuned on, written by hand."""

    name = "caption"
    title = "Captions"
    sentence = "Describe this picture."
    guideline = (
        "Write what someone would have to ask for to be given this picture. One to three plain sentences.\n\n"
        "Begin with the main subject and what it does. Then say where it is, what surrounds it, and what "
        "stands out: colours, materials, light, time of day, the angle, the kind of picture if it is not a "
        "photograph.\n\n"
        "Describe what can be seen. Do not guess names, places or feelings that the picture does not show, "
        "do not praise it, and do not write about the picture as an object (no 'this image shows').\n\n"
        "Copy text that can be read in the picture, in quotation marks. Check the spelling before you send."
    )
    template = "caption.html"
    roles = ("generalist", "specialist")
    has_votes = False
    options = {"written": "Send"}
    keys: ClassVar[Mapping[str, Answer]] = {}

    @classmethod
    def check(cls, answer: Answer) -> Answer:
        _only(answer, {"text"})
        return {"text": _text(answer.get("text"), "text", 1, LONGEST_CAPTION)}

    @classmethod
    def option(cls, answer: Answer) -> str:
        return "written"

    @classmethod
    def vote(cls, answer: Answer) -> None:
        return None


class Verification(Question):
    """A second person reads each caption; never the one who wrote it."""

    name = "verification"
    title = "Caption check"
    sentence = "Does the caption describe the picture?"
    guideline = (
        "Someone else wrote this caption. Read it, then look at the picture, and check every statement.\n\n"
        "Accept it if all it says can be seen, nothing important is missing, and it reads well.\n\n"
        "Edit it if a small change makes it right: a wrong colour or number, a missing main object, a "
        "misspelt word. Keep the writer's wording where it is right.\n\n"
        "Reject it if it would have to be written anew: it is about another picture, mostly wrong, or says "
        "next to nothing."
    )
    template = "verification.html"
    roles = ("generalist", "specialist")
    shows_caption = True
    options = {"reject": "Reject", "edit": "Edit", "accept": "Accept"}
    keys = {
        "ArrowRight": {"verdict": "accept"},
        "a": {"verdict": "accept"},
        "ArrowDown": {"verdict": "edit"},
        "e": {"verdict": "edit"},
        "ArrowLeft": {"verdict": "reject"},
        "r": {"verdict": "reject"},
    }

    @classmethod
    def check(cls, answer: Answer) -> Answer:
        verdict = _one_of(answer.get("verdict"), "verdict", cls.options)
        if verdict != "edit":
            _only(answer, {"verdict"})
            return {"verdict": verdict}
        _only(answer, {"verdict", "text"})
        return {"verdict": verdict, "text": _text(answer.get("text"), "text", 1, LONGEST_CAPTION)}

    @classmethod
    def option(cls, answer: Answer) -> str:
        return str(answer["verdict"])

    @classmethod
    def check_gold(cls, gold: Answer) -> Answer:
        _only(gold, {"verdict"})
        return {"verdict": _one_of(gold.get("verdict"), "verdict", cls.options)}


class Pair(Choice):
    """A choice between two pictures. Stored answers are those of :class:`~..evaluation.votes.Judgement`."""

    template = "pair.html"
    roles = ("generalist", "specialist")
    num_pictures = 2
    _stored: ClassVar[Mapping[str, str]]  # options that are no side -> as stored

    @classmethod
    def to_slots(cls, answer: Answer, left: Slot) -> Answer:
        return {"choice": {**cls._stored, **_slots(left)}[answer["choice"]]}

    @classmethod
    def to_sides(cls, answer: Answer, left: Slot) -> Answer:
        sides = {stored: option for option, stored in {**cls._stored, **_slots(left)}.items()}
        return {"choice": sides[answer["choice"]]}

    @classmethod
    def check_gold(cls, gold: Answer) -> Answer:
        _only(gold, {"choice"})
        return {"choice": _one_of(gold.get("choice"), "choice", ["A", "B", *cls._stored.values()])}


class Appeal(Pair):
    """Which of two pictures looks better; the prompt stays hidden. Five people, as in the paper."""

    name = "appeal"
    title = "Visual appeal"
    sentence = "Which picture looks better?"
    guideline = (
        "Judge only how good each picture looks. You are not told what was asked for, and it does not "
        "matter: do not try to guess it.\n\n"
        "Look at both pictures in full before you answer. Take in composition, light, colour, and detail; "
        "count faults such as broken shapes, extra limbs, smeared textures or garbled letters. Zoom in if "
        "they look alike from afar.\n\n"
        "Choose a side if you would rather look at that picture, even by a little. Choose tie only if you "
        "truly cannot say.\n\n"
        "Whether a picture stands left or right is drawn anew each time and means nothing."
    )
    num_people = 5
    options = {"left": "Left", "tie": "Tie", "right": "Right"}
    keys = {
        "ArrowLeft": {"choice": "left"},
        "a": {"choice": "left"},
        "ArrowRight": {"choice": "right"},
        "b": {"choice": "right"},
        "ArrowDown": {"choice": "tie"},
        "t": {"choice": "tie"},
    }
    _stored = {"tie": "Tie"}


class Faithfulness(Pair):
    """Which of two pictures shows what was asked for. Three people, as in the paper."""

    name = "faithfulness"
    title = "Text faithfulness"
    sentence = "Which picture shows what the text says? Ignore how good the pictures look."
    guideline = (
        "Judge only whether each picture shows what the text asks for. Ignore how good the pictures look: "
        "an ugly picture that shows everything is more faithful than a beautiful one that leaves "
        "something out.\n\n"
        "Read the text first and note what it names: the things, how many of each, their colours and other "
        "properties, what they do, where they are to each other, and the style. Then check each picture "
        "against it.\n\n"
        "Choose a side if that picture shows more of it. Choose both if both show all of it, and neither if "
        "both fail and none is closer.\n\n"
        "What the text leaves open counts for neither side."
    )
    shows_prompt = True
    num_people = 3
    options = {"left": "Left", "both": "Both", "neither": "Neither", "right": "Right"}
    keys = {
        "ArrowLeft": {"choice": "left"},
        "a": {"choice": "left"},
        "ArrowRight": {"choice": "right"},
        "b": {"choice": "right"},
        "ArrowUp": {"choice": "both"},
        "t": {"choice": "both"},
        "ArrowDown": {"choice": "neither"},
        "n": {"choice": "neither"},
    }
    _stored = {"both": "Both", "neither": "Neither"}

    @classmethod
    def vote(cls, answer: Answer) -> str:
        choice = str(answer["choice"])
        return "Tie" if choice in cls._stored.values() else choice


QUESTIONS: dict[str, type[Question]] = {
    question.name: question
    for question in (Screening, Photography, Caption, Verification, Appeal, Faithfulness)
}


def clean_text(text: str) -> str | None:
    """Without blanks at the ends; None where it holds control characters, which no database keeps well.

    Those that turn the direction of what follows are refused too; those that join letters are not: Persian,
    Hindi and many emoji need them.
    """
    text = text.replace("\r\n", "\n").strip()
    has_control = any(category(one) in _CONTROLS and one not in "\n\t" or one in _TURNS for one in text)
    return None if has_control else text


def _only(answer: Answer, fields: set[str]) -> None:
    unknown = sorted(str(field) for field in answer if field not in fields)
    if unknown:
        raise ValueError(f"answer has an unknown field {unknown[0]!r}: use {', '.join(sorted(fields))}")


def _one_of(value: object, field: str, options: Mapping[str, str] | Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{field} is {value!r}: use one of {', '.join(options)}")
    return value


def _points(value: object, criterion: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1, 2):
        raise ValueError(f"{criterion} is {value!r}: give 0, 1 or 2")
    return value


def _yes_or_no(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{field} is {value!r}: give true or false")
    return value


def _text(value: object, field: str, shortest: int, longest: int) -> str:
    text = clean_text(value) if isinstance(value, str) else None
    if text is None:
        raise ValueError(f"{field} is not plain text: remove control characters")
    if not shortest <= len(text) <= longest:
        raise ValueError(f"{field} has {len(text)} characters: write {shortest} to {longest}")
    return text


def _slots(left: Slot) -> dict[str, str]:
    return {"left": left, "right": "B" if left == "A" else "A"}
