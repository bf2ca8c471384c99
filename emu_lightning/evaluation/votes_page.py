"""The page on which a person reads what votes say of two models, or of more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emu_lightning.evaluation import report
from emu_lightning.evaluation.davidson import Davidson
from emu_lightning.evaluation.outcomes import LEAST_IN_SLICE, Outcome, in_order, planned_p, strengths
from emu_lightning.evaluation.report import Html, Section, join, percent, percent_interval, points, tag
from emu_lightning.evaluation.votes import NoMajority, Question, RaterKind, WinRate, win_rate

TITLES: Mapping[Question, str] = {
    "appeal": "Which picture looks better? (prompt hidden)",
    "faithfulness": "Which picture follows the prompt? (looks set aside)",
}
ON: Mapping[Question, str] = {"appeal": "On looks", "faithfulness": "On following the prompt"}
RATERS: Mapping[RaterKind, str] = {"person": "people", "model": "models"}
POLICIES: Mapping[NoMajority, str] = {
    "tie": "count as ties",
    "exclude": "are left out of every figure above",
    "extra_rater": "wait for one more rater and are left out until then",
}
# Of most prompts both pictures show as much of the prompt: the share of wins alone says little there.
FIGURE: Mapping[Question, Literal["win", "win_minus_lose"]] = {
    "appeal": "win",
    "faithfulness": "win_minus_lose",
}
FIGURES = {"win": "wins", "win_minus_lose": "wins minus losses"}
CLEAR = 0.8  # of a prompt's votes: four of five, three of three
NUM_SHOWN = 8  # pairs of pictures of each verdict
CHANCE = 0.05


def votes_page(
    title: str,
    outcomes: Sequence[Outcome],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, str],
) -> Html:
    """Headline, tables, chance, slices, pictures, who judged, settings, provenance.

    Args:
        title: of the page.
        outcomes: of any questions, prompt sets, pairs of models and kinds of raters; at least one.
        settings: everything that was set; folded.
        command: what made this page.
        facts: name and value of what else made it.
    """
    main, *others = in_order(outcomes).values()
    fits = strengths(main)
    sections = [
        Section("Result", [*([] if fits else [_cards(main)]), *_tables(main)], RESULT_INTRO),
        *([Section("Strengths", _strength_tables(fits), STRENGTHS)] if fits else []),
        Section("Could it be chance?", [_chance_table(main)], CHANCE_INTRO),
        *_picture_sections(main),
        Section("Single votes", [_votes_table(main), *_no_majority(main)], VOTES_INTRO),
        *_slice_sections(main),
        Section("Who judged", _who(main)),
    ]
    for models in others:
        sections.append(Section("What models said", _tables(models), MODELS_INTRO))
    sections += [
        Section("Settings", [report.settings(settings)]),
        Section("How to repeat this", [report.provenance(command, facts)]),
    ]
    return report.page(title, _sentence(main, fits), sections, remark=_remark(main))


# --- in words -----------------------------------------------------------------------------------------------

CHANCE_INTRO = (
    "p says how often a difference of this size or more would come up if neither model were better. With "
    "several comparisons, one looks good by luck more easily; the corrected p (Holm) allows for that. All "
    "rows here count as planned, ties do not count. Below 0.05 the difference is taken as shown."
)
VOTES_INTRO = (
    "A majority sharpens what single votes say: where 70 of 100 votes prefer a model, it may win 84 of "
    "100 prompts. So figures of majorities and of single votes must not be compared with each other, here "
    "or between papers. The interval with other raters allows for other people having been asked, too."
)
STRENGTHS = (
    "One strength for each model, from all pairs at once (Davidson’s model, which gives ties their own "
    "place). Two models are told apart where the interval of their difference leaves out 0. Wins, ties "
    "and losses are what the strengths expect of the two."
)
MODELS_INTRO = "Answers of models, by themselves: they are never pooled with those of people."
PICTURES_INTRO = (
    f"Not chosen: every so-many-th prompt of each verdict, up to {NUM_SHOWN}. The number under a picture "
    "is how many raters preferred it; clearly means four of five, or all of three."
)
SLICES_INTRO = (
    "To look for ideas, not to prove anything: of many groups some look good or bad by luck. q allows for "
    "their number (Benjamini and Hochberg): of groups with q below 0.10, one in ten or so is a false "
    f"alarm. Groups of fewer than {LEAST_IN_SLICE} prompts are left out."
)
AGREEMENT_INTRO = (
    "Two raters saw the same two pictures: how often did they give the same answer, and how often would "
    "they have by lot, each answer as likely as it was frequent? Alpha (Krippendorff’s) is what is left "
    "beyond it: 0 is no better than by lot, 1 is always the same. Where nearly all answers are the same, "
    "lots agree nearly always, too, and alpha is low without bad raters."
)
RESULT_INTRO = (
    "Every prompt counts once, as the answer that more than half of its votes gave. Wins, ties and losses "
    "add up to 100. Wins minus losses is in points, beside the range that holds the truth in 95 of 100 "
    "such evaluations."
)


def _sentence(outcomes: Sequence[Outcome], fits: Mapping[Question, Davidson]) -> Html:
    if fits:
        return join(*(part for question, fit in fits.items() for part in (_order(question, fit), " ")))
    asked = {question: [one for one in outcomes if one.question == question] for question in TITLES}
    return join(*(_clause(question, found) for question, found in asked.items() if found))


def _clause(question: Question, outcomes: Sequence[Outcome]) -> Html:
    verdicts = list(dict.fromkeys(map(_verdict, outcomes)))
    verdict = verdicts[0] if len(verdicts) == 1 else "it depends on the prompts"
    parts = [f"{ON[question]}, {verdict}: {outcomes[0].judged.b} wins "]
    for row, one in enumerate(outcomes):
        rate = one.rate
        ends = f"{points(rate.win_minus_lose)} points, {report.points_interval(rate.win_minus_lose_ci95)}"
        parts += [
            ", " if row else "",
            tag("strong", percent(rate.win)),
            f" of {rate.num_prompts:,} prompts and loses {percent(rate.lose)} ",
            tag("small", f"({ends})" if len(outcomes) == 1 else f"({one.judged.prompts.name})"),
        ]
    return join(*parts, ". ")


def _verdict(one: Outcome) -> str:
    low, high = one.rate.win_minus_lose_ci95
    if low <= 0 <= high:
        return "no clear difference"
    return f"{one.judged.b if low > 0 else one.judged.a} is preferred"


def _order(question: Question, fit: Davidson) -> Html:
    first, *others = fit.strengths
    beaten = [other for other in others if (first, other) in fit.told_apart]
    if len(beaten) == len(others):
        words = "is preferred to all others"
    elif beaten:
        words = f"comes first, and is clearly preferred to {' and '.join(beaten)} only"
    else:
        words = "comes first, but not clearly before any other"
    return join(f"{ON[question]}, ", tag("strong", first), f" {words}.")


def _remark(outcomes: Sequence[Outcome]) -> str:
    kind = outcomes[0].rater_kind
    num = len({rater for one in outcomes for rater in one.raters})
    who = f"{num:,} {RATERS[kind]}" if num > 1 else f"one {kind}"
    votes = sum(len(one.votes) for one in outcomes)
    warning = "" if kind == "person" else " No person has judged."
    return f"Judged by {who} in {votes:,} vote{'s' if votes > 1 else ''}.{warning}"


# --- result -------------------------------------------------------------------------------------------------


def _cards(outcomes: Sequence[Outcome]) -> Html:
    first = outcomes[0]
    figures = [
        report.Figure(
            f"{one.judged.b} wins, {_label(one, outcomes)}",
            percent(one.rate.win),
            percent_interval(one.rate.ci95),
        )
        for one in outcomes
        if one.judged.prompts.name == first.judged.prompts.name
    ]
    per_prompt = np.array([counts.total() for counts in first.counts.values()])
    figures += [
        report.Figure(
            "prompts judged", f"{len(first.counts):,}", f"of {len(first.judged.prompts):,} in the set"
        ),
        report.Figure(f"votes a prompt, {first.question}", f"{per_prompt.mean():.3g}", _range(per_prompt)),
    ]
    return report.key_figures(figures)


def _range(counts: np.ndarray) -> str:
    return "on every prompt" if np.ptp(counts) == 0 else f"from {counts.min()} to {counts.max()}"


def _tables(outcomes: Sequence[Outcome]) -> list[Html]:
    """A table for each pair of models, in the layout of the paper's."""
    pairs = list(dict.fromkeys((one.judged.a, one.judged.b) for one in outcomes))
    tables = []
    for a, b in pairs:
        groups: dict[str, dict[str, WinRate]] = {}
        for one in outcomes:
            if (one.judged.a, one.judged.b) == (a, b):
                groups.setdefault(TITLES[one.question], {}).update(_rows(one))
        caption = f"{b} against {a}, in percent of prompts" if len(pairs) > 1 else ""
        tables.append(report.outcome_table(groups, (a, b), caption=caption))
    return tables


def _rows(one: Outcome) -> dict[str, WinRate]:
    rows = {one.judged.prompts.name: one.rate}
    marked = one.judged.prompts.is_stylized
    if any(marked) and not all(marked):
        labels = [label for p, label in one.majority.labels.items() if marked[one.judged.row_of[p]]]
        if labels:
            rows[f"{one.judged.prompts.name}, stylized (our choice)"] = win_rate(labels, of="B")
    return rows


def _label(one: Outcome, outcomes: Sequence[Outcome]) -> str:
    """What tells an outcome from the others on the page."""
    parts: list[str] = [one.question]
    if len({(o.judged.a, o.judged.b) for o in outcomes}) > 1:
        parts.append(f"{one.judged.b} against {one.judged.a}")
    if len({o.judged.prompts.name for o in outcomes}) > 1:
        parts.append(one.judged.prompts.name)
    return ", ".join(parts)


def _chance_table(outcomes: Sequence[Outcome]) -> Html:
    rows = []
    for one, p in zip(outcomes, planned_p(outcomes), strict=True):
        wins, losses = (round(share * one.rate.num_labels) for share in (one.rate.win, one.rate.lose))
        better = one.judged.b if wins > losses else one.judged.a
        rows.append(
            [
                _label(one, outcomes),
                f"{better} is preferred" if p < CHANCE else "no difference shown",
                f"{wins:,} : {losses:,}",
                report.p_value(p),
                report.p_value(one.rate.sign_test_p),
            ]
        )
    heads = ["", "what it shows", "won : lost", "p, corrected", "p alone"]
    return report.table(heads, rows, right=(2, 3, 4))


def _votes_table(outcomes: Sequence[Outcome]) -> Html:
    rows = []
    for one in outcomes:
        wide = one.share.two_way_ci95
        kinds = [
            f"{answer.lower()} {percent(one.answers[answer] / len(one.votes), 0)}"
            for answer in ("Both", "Neither")
            if one.answers.get(answer)
        ]
        rows.append(
            [
                _label(one, outcomes),
                f"{len(one.votes):,}",
                percent(one.rate.win),
                _over(percent(one.share.win), percent_interval(one.share.ci95)),
                "one rater only" if wide is None else percent_interval(wide),
                _over(percent(one.share.tie), ", ".join(kinds)),
            ]
        )
    heads = ["", "votes", "wins by majority", "wins by votes", "with other raters", "ties among votes"]
    return report.table(heads, rows, right=range(1, 6))


def _over(text: str, small: str) -> Html:
    return join(text, tag("small", small, css="under"))


def _no_majority(outcomes: Sequence[Outcome]) -> list[Html]:
    counts = [(len(one.majority.no_majority), len(one.counts), _label(one, outcomes)) for one in outcomes]
    words = "; ".join(f"{num:,} of {all_:,} on {name} ({percent(num / all_)})" for num, all_, name in counts)
    policy = POLICIES[outcomes[0].no_majority]
    return [tag("p", tag("strong", "Prompts without a majority"), f": {words}. They {policy}.")]


# --- strengths of three or more -----------------------------------------------------------------------------


def _strength_tables(fits: Mapping[Question, Davidson]) -> list[Html]:
    parts = []
    for question, fit in fits.items():
        rows = [
            [
                f"{stronger} before {weaker}",
                report.number(value, 2),
                f"{report.number(ci95[0], 2)} to {report.number(ci95[1], 2)}",
                *(percent(share, 0) for share in fit.probabilities(stronger, weaker)),
                "told apart" if (stronger, weaker) in fit.told_apart else "not told apart",
            ]
            for (stronger, weaker), (value, ci95) in fit.differences.items()
        ]
        heads = ["", "difference", "95\u00a0% interval", "wins", "ties", "loses", ""]
        parts.append(report.table(heads, rows, caption=TITLES[question], right=range(1, 6)))
    return parts


# --- where, and pictures ------------------------------------------------------------------------------------


def _slice_sections(outcomes: Sequence[Outcome]) -> list[Section]:
    tables = [
        report.slice_table(
            one.slices,
            one.rate,
            caption=f"{_label(one, outcomes)}: {FIGURES[FIGURE[one.question]]} of {one.judged.b}",
            figure=FIGURE[one.question],
            q_values=one.slice_q,
        )
        for one in outcomes
        if one.slices
    ]
    return [Section("By kind of prompt", tables, SLICES_INTRO)] if tables else []


def _picture_sections(outcomes: Sequence[Outcome]) -> list[Section]:
    parts = [
        join(
            report.heading(f"{_label(one, outcomes)}: {verdict}, {len(prompts):,} prompts"),
            _grid(one, _evenly(prompts)),
        )
        for one in outcomes
        if one.judged.pictures is not None
        for verdict, prompts in _verdicts(one).items()
        if prompts
    ]
    return [Section("Pictures", parts, PICTURES_INTRO)] if parts else []


def _verdicts(one: Outcome) -> dict[str, list[str]]:
    """Prompts by how their votes fell, in the order of the prompt set."""
    b = one.judged.b
    found: dict[str, list[str]] = {f"{b} won clearly": [], f"{b} lost clearly": [], "split": []}
    clear, lost, split = found.values()
    for prompt in sorted(one.counts, key=one.judged.row_of.__getitem__):
        counts = one.counts[prompt]
        total = counts.total()
        if counts["B"] >= CLEAR * total:
            clear.append(prompt)
        elif counts["A"] >= CLEAR * total:
            lost.append(prompt)
        elif abs(counts["A"] - counts["B"]) <= 1 and 2 * counts["Tie"] < total:
            split.append(prompt)
    return found


def _evenly(prompts: Sequence[str]) -> list[str]:
    rows = np.unique(np.linspace(0, len(prompts) - 1, min(len(prompts), NUM_SHOWN)).round().astype(int))
    return [prompts[row] for row in rows]


def _grid(one: Outcome, prompts: Sequence[str]) -> Html:
    assert one.judged.pictures is not None
    rows = [one.judged.row_of[prompt] for prompt in prompts]
    names = one.judged.a, one.judged.b
    counts = [one.counts[prompt] for prompt in prompts]
    return report.figure_grid(
        {
            name: [folder[row] for row in rows]
            for name, folder in zip(names, one.judged.pictures, strict=True)
        },
        [one.judged.prompts.prompts[row] for row in rows],
        scores={names[0]: [each["A"] for each in counts], names[1]: [each["B"] for each in counts]},
        digits=0,
        remarks=[f"{each['Tie']} tied" if each["Tie"] else "" for each in counts],
    )


# --- who judged ---------------------------------------------------------------------------------------------


def _who(outcomes: Sequence[Outcome]) -> list[Html]:
    return [
        report.heading("Do they agree?", AGREEMENT_INTRO),
        _agreement_table(outcomes),
        report.heading("Does the side matter?"),
        *(tag("p", _side(one, outcomes)) for one in outcomes),
        *(_raters(one, outcomes) for one in outcomes),
    ]


def _agreement_table(outcomes: Sequence[Outcome]) -> Html:
    rows = []
    for one in outcomes:
        agreed = one.agreement
        chance = sum(share**2 for share in agreed.prevalence.values())
        label, most = max(agreed.prevalence.items(), key=lambda each: each[1])
        name = {"A": one.judged.a, "B": one.judged.b, "Tie": "tie"}[str(label)]
        rows.append(
            [
                _label(one, outcomes),
                f"{agreed.num_pairs:,}",
                "no two votes on a prompt" if agreed.raw is None else percent(agreed.raw, 0),
                percent(chance, 0),
                "not defined" if agreed.alpha is None else report.number(agreed.alpha, 2),
                f"{name}, {percent(most, 0)} of votes",
            ]
        )
    heads = ["", "pairs of votes", "same answer", "by lot", "alpha", "most frequent answer"]
    return report.table(heads, rows, right=range(1, 5))


def _side(one: Outcome, outcomes: Sequence[Outcome]) -> str:
    bias, name = one.position, _label(one, outcomes).capitalize()
    if bias is None:
        return f"{name}: the votes do not say which picture stood on the left."
    if bias.p >= CHANCE:
        verdict = "no leaning to a side shows"
    else:
        verdict = f"raters lean to the {'left' if bias.left > 0.5 else 'right'}"
    return (
        f"{name}: of {bias.num_votes:,} votes for a picture, {percent(bias.left)} went to the left one "
        f"({percent_interval(bias.ci95)}): {verdict}. {one.judged.b} stood on the left in "
        f"{percent(one.b_on_the_left or 0)} of votes, so that a leaning "
        f"{'cancels out' if abs((one.b_on_the_left or 0) - 0.5) < 0.05 else 'would move the result'}."
    )


def _raters(one: Outcome, outcomes: Sequence[Outcome]) -> Html:
    alike: dict[str, float] = {}
    pairs: dict[str, int] = {}
    for pair in one.agreement.by_pair:
        for rater in map(str, pair.raters):
            alike[rater] = alike.get(rater, 0) + pair.raw * pair.num_items
            pairs[rater] = pairs.get(rater, 0) + pair.num_items
    rows = []
    for rater in one.raters:
        labels = [label for (_, who), label in one.votes.items() if who == rater]
        shares = [percent(labels.count(label) / len(labels), 0) for label in ("B", "Tie", "A")]
        agreed = percent(alike[rater] / pairs[rater], 0) if rater in pairs else "nobody to compare with"
        rows.append([rater, f"{len(labels):,}", agreed, *shares])
    heads = ["rater", "votes", "agrees with others", one.judged.b, "tie", one.judged.a]
    summary = tag("summary", f"Raters, {_label(one, outcomes)} ", tag("small", f"{len(rows):,}"))
    return tag("details", summary, report.table(heads, rows, right=range(1, 6)))
