"""What the votes on two models' pictures say: one outcome for each question, prompt set and kind of rater."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from emu_lightning.evaluation.agreement import Agreement, agreement
from emu_lightning.evaluation.davidson import Comparison, Davidson, fit_davidson
from emu_lightning.evaluation.generation import PictureFolder
from emu_lightning.evaluation.prompts import PromptSet
from emu_lightning.evaluation.votes import (
    Judgement,
    Label,
    Majority,
    NoMajority,
    PositionBias,
    Question,
    RaterKind,
    WinRate,
    benjamini_hochberg,
    holm,
    latest_votes,
    majority_labels,
    position_bias,
    vote_share,
    win_rate,
    win_rates_by,
)

LEAST_IN_SLICE = 5  # prompts; below, an interval covers nearly everything


@dataclass(frozen=True)
class Judged:
    """Votes on two models' pictures of one prompt set.

    Attributes:
        a: what the model whose pictures are A is called.
        b: the model whose wins are counted.
        prompts: what was drawn. A judgement names a prompt by its text or by its id; where texts repeat, by
            ``text [id]``.
        judgements: of people and of models, on both questions.
        pictures: of ``a`` and of ``b``, or nothing.

    Raises:
        ValueError: a judgement is about a prompt that is not in the set, or both models have one name.
    """

    a: str
    b: str
    prompts: PromptSet
    judgements: Sequence[Judgement]
    pictures: tuple[PictureFolder, PictureFolder] | None = None

    def __post_init__(self) -> None:
        if self.a == self.b:
            raise ValueError(f"both models are called {self.a!r}: give them names of their own")
        strange = {judgement.prompt for judgement in self.judgements} - self.row_of.keys()
        if strange:
            raise ValueError(
                f"{len(strange)} judged prompts are not in {self.prompts.name!r}, such as {min(strange)!r}: "
                "give the prompt set that was judged"
            )

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """The row of each name that a judgement may give a prompt."""
        rows = list(enumerate(zip(self.prompts.prompts, self.prompts.ids, strict=True)))
        named = {f"{text} [{id_}]": row for row, (text, id_) in rows}
        return named | {id_: row for row, (_, id_) in rows} | {text: row for row, (text, _) in reversed(rows)}

    @property
    def kinds(self) -> list[tuple[Question, RaterKind]]:
        """What was asked of whom: people first, appeal first."""
        there = {(judgement.question, judgement.rater_kind) for judgement in self.judgements}
        order = [(q, kind) for kind in get_args(RaterKind) for q in get_args(Question)]
        return [one for one in order if one in there]


@dataclass(frozen=True)
class Outcome:
    """One question about one prompt set, answered by one kind of rater; wins are of model ``b``.

    Attributes:
        judged: the votes and what they are about.
        question: appeal or faithfulness.
        rater_kind: people or models, never both.
        no_majority: what became of prompts without a majority.
        majority: one label per prompt.
        rate: what the majorities say; the unit is the prompt.
        share: what single votes say. Never to be compared with ``rate``: majorities amplify.
        agreement: of the raters with each other.
        position: bias towards the left, None where no vote says what stood there.
        votes: by (prompt, rater); of each rater the latest, Both and Neither as Tie.
        answers: how often each answer was given, Both and Neither apart.
        b_on_the_left: share of the votes whose sides are known that saw ``b`` there; None without any.
    """

    judged: Judged
    question: Question
    rater_kind: RaterKind
    no_majority: NoMajority
    votes: Mapping[tuple[str, str], Label]
    answers: Mapping[str, int]
    majority: Majority
    rate: WinRate
    share: WinRate
    agreement: Agreement
    position: PositionBias | None
    b_on_the_left: float | None

    @property
    def raters(self) -> list[str]:
        return sorted({rater for _, rater in self.votes})

    @property
    def name(self) -> str:
        return f"{self.question}, {self.judged.prompts.name}"

    @cached_property
    def counts(self) -> Mapping[str, Counter[Label]]:
        """The votes on each prompt, by label."""
        counts: dict[str, Counter[Label]] = {}
        for (prompt, _), label in self.votes.items():
            counts.setdefault(prompt, Counter())[label] += 1
        return counts

    @cached_property
    def slices(self) -> Mapping[str, Mapping[str, WinRate]]:
        """Group -> slice -> its win rate, of slices with at least :data:`LEAST_IN_SLICE` judged prompts."""
        prompts, groups = self.judged.prompts, {}
        stylized = tuple("stylized (our choice)" if one else "the rest" for one in prompts.is_stylized)
        for group, names in (
            ("category", prompts.categories),
            ("challenge", prompts.challenges),
            ("style", stylized if len(set(stylized)) > 1 else ()),
        ):
            if names:
                own = [names[self.judged.row_of[prompt]] for prompt in self.majority.labels]
                rates = win_rates_by(own, list(self.majority.labels.values()), of="B")
                groups[group] = {n: rate for n, rate in rates.items() if rate.num_prompts >= LEAST_IN_SLICE}
        return {group: rates for group, rates in groups.items() if rates}

    @cached_property
    def slice_q(self) -> Mapping[str, Mapping[str, float]]:
        """q-values (Benjamini and Hochberg) of all slices together: that wins and losses differ in it."""
        flat = {(g, n): rate.sign_test_p for g, rates in self.slices.items() for n, rate in rates.items()}
        keys = {f"{group}\n{name}": (group, name) for group, name in flat}
        found = benjamini_hochberg({key: flat[pair] for key, pair in keys.items()})
        q: dict[str, dict[str, float]] = {}
        for key, (group, name) in keys.items():
            q.setdefault(group, {})[name] = found[key]
        return q

    def to_dict(self) -> dict[str, Any]:
        """Everything for ``results.json``."""
        majority, agreed = self.majority, self.agreement
        return {
            "a": self.judged.a,
            "b": self.judged.b,
            "prompt_set": {
                "name": self.judged.prompts.name,
                "sha256": self.judged.prompts.sha256,
                "num_prompts": len(self.judged.prompts),
            },
            "question": self.question,
            "rater_kind": self.rater_kind,
            "num_raters": len(self.raters),
            "num_votes": len(self.votes),
            **self.rate.to_dict("win_rate" if self.question == "appeal" else "win_minus_lose"),
            "vote_share": self.share.to_dict("win_rate"),
            "answers": dict(self.answers),
            "no_majority": {
                "policy": self.no_majority,
                "num_prompts": len(majority.no_majority),
                "share": len(majority.no_majority) / len(self.counts),
                "need_a_rater": list(majority.needs_rater),
            },
            "agreement": {
                "raw": agreed.raw,
                "alpha": agreed.alpha,
                "prevalence": dict(agreed.prevalence),
                "num_pairs": agreed.num_pairs,
            },
            "position": None
            if self.position is None
            else {
                "left": self.position.left,
                "ci95": list(self.position.ci95),
                "p": self.position.p,
                "num_votes": self.position.num_votes,
                "b_on_the_left": self.b_on_the_left,
            },
            "slices": {
                group: {
                    name: {**rate.to_dict("win_rate"), "q": self.slice_q[group][name]}
                    for name, rate in rates.items()
                }
                for group, rates in self.slices.items()
            },
        }


def outcome(judged: Judged, question: Question, rater_kind: RaterKind, no_majority: NoMajority) -> Outcome:
    """Counts the votes of one kind of rater on one question.

    Raises:
        ValueError: there is no vote, or none is left where prompts without a majority are left out.
    """
    asked = [j for j in judged.judgements if j.question == question and j.rater_kind == rater_kind]
    latest = {(j.prompt, j.rater): j for j in asked}  # the later record of a rater counts
    majority = majority_labels(asked, question, no_majority)
    if not majority.labels:
        raise ValueError(
            f"no prompt of {judged.prompts.name!r} has a majority on {question}: with few votes a prompt, "
            "let no_majority be tie"
        )
    sides = [one.left for one in latest.values() if one.left is not None]
    return Outcome(
        judged=judged,
        question=question,
        rater_kind=rater_kind,
        no_majority=no_majority,
        votes=latest_votes(asked, question),
        answers=Counter(one.answer for one in latest.values()),
        majority=majority,
        rate=win_rate(list(majority.labels.values()), of="B"),
        share=vote_share(asked, question, of="B"),
        agreement=agreement(asked, question),
        position=position_bias(asked, question),
        b_on_the_left=sides.count("B") / len(sides) if sides else None,
    )


def planned_p(outcomes: Sequence[Outcome]) -> list[float]:
    """The sign tests of planned comparisons, corrected for their number (Holm)."""
    corrected = holm({str(row): one.rate.sign_test_p for row, one in enumerate(outcomes)})
    return [corrected[str(row)] for row in range(len(outcomes))]


def strengths(outcomes: Sequence[Outcome]) -> dict[Question, Davidson]:
    """Davidson's model of three or more models, for each question; nothing where there are two.

    Args:
        outcomes: of one kind of rater.
    """
    if len({name for one in outcomes for name in (one.judged.a, one.judged.b)}) < 3:
        return {}
    by_question: dict[Question, list[Comparison]] = {}
    for one in outcomes:
        texts, rows = one.judged.prompts.prompts, one.judged.row_of
        by_question.setdefault(one.question, []).extend(
            Comparison(texts[rows[prompt]], one.judged.a, one.judged.b, label)
            for prompt, label in one.majority.labels.items()
        )
    return {question: fit_davidson(comparisons) for question, comparisons in by_question.items()}


def in_order(outcomes: Sequence[Outcome]) -> dict[RaterKind, list[Outcome]]:
    """By kind of rater, people first; of each kind appeal first."""
    questions = list(get_args(Question))
    ordered = sorted(outcomes, key=lambda one: questions.index(one.question))
    found = {kind: [one for one in ordered if one.rater_kind == kind] for kind in get_args(RaterKind)}
    return {kind: ones for kind, ones in found.items() if ones}


def results_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything for ``results.json``: each comparison, and the strengths of three or more models."""
    comparisons, fits = [], {}
    for kind, ones in in_order(outcomes).items():
        for one, p in zip(ones, planned_p(ones), strict=True):
            comparisons.append({**one.to_dict(), "sign_test_p_holm": p})
        if found := strengths(ones):
            fits[kind] = {question: fit.to_dict() for question, fit in found.items()}
    return {"comparisons": comparisons, **({"strengths": fits} if fits else {})}
