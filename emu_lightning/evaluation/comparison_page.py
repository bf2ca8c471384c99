"""The page on which a person reads how two models compare."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu_lightning.evaluation import report
from emu_lightning.evaluation.comparison import Comparison
from emu_lightning.evaluation.generation import PictureFolder
from emu_lightning.evaluation.report import Html, Section
from emu_lightning.evaluation.votes import win_rates_by

Pictures = NDArray[np.uint8]
APPEAL_QUESTION, FAITHFULNESS_QUESTION = (
    "Which picture looks better?",
    "Which picture shows what the prompt says?",
)

NOT_CHOSEN = "Not chosen: every so-many-th prompt. The number is the judge's appeal, from 0 to 1."
LOST = "The prompts on which the tuned picture lost most faithfulness, then most appeal."


def comparison_page(
    title: str,
    result: Comparison,
    pictures: Mapping[str, Pictures] | Mapping[str, PictureFolder],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, str] | None = None,
    cards: Sequence[report.Figure] = (),
    sections: Sequence[Section] = (),
    slices: Mapping[str, Sequence[str]] | None = None,
    judge: str = "the scorer named in the settings",
) -> Html:
    """Headline, win rates, pictures, lost pictures, slices, what else is given, settings, provenance.

    Args:
        title: of the page.
        result: the judged comparison.
        pictures: ``base`` and ``tuned``, (N, H, W, 3) each, or where they lie.
        prompts: the N prompts.
        settings: everything that was set; folded.
        command: what made this page.
        facts: name and value of what else made it (seconds, memory).
        cards: further key figures.
        sections: shown between the pictures and the settings.
        slices: group name to the N slices the prompts fall into, such as {"colour": ["red", ...]}.
        judge: who judged, in the remark under the headline.
    """
    appeal, faithfulness = result.appeal, result.faithfulness
    figures = [
        report.Figure("appeal win rate", report.percent(appeal.win), report.percent_interval(appeal.ci95)),
        report.Figure(
            "faithfulness, win minus lose",
            f"{report.points(faithfulness.win_minus_lose)} points",
            report.points_interval(faithfulness.win_minus_lose_ci95),
        ),
        *cards,
    ]
    shown = evenly(len(prompts), 24)
    body = [
        Section("Result", [report.key_figures(figures), *win_bars(result)]),
        Section("Pictures", [grid(result, pictures, prompts, shown)], NOT_CHOSEN),
    ]
    lost = worst(result, 8)
    if len(lost):
        body.append(Section("Where tuning lost", [grid(result, pictures, prompts, lost)], LOST))
    if slices:
        tables = report.slice_table(
            {group: _by(names, result, prompts) for group, names in slices.items()},
            appeal,
            caption="Appeal win rate within slices. Exploratory: many slices, no correction.",
        )
        body.append(Section("By what the prompt says", [tables]))
    body += [
        *sections,
        Section("Settings", [report.settings(settings)]),
        Section("How this was made", [report.provenance(command, {**environment(), **(facts or {})})]),
    ]
    sentence = report.headline(appeal, faithfulness)
    return report.page(
        title, sentence, body, remark=f"Judged by {judge}. Equal prompts and seeds for both models."
    )


def environment() -> dict[str, str]:
    """Machine, date and versions, for a page or a results file."""
    packages = ("torch", "lightning", "diffusers", "torchmetrics")
    return {
        "machine": f"{platform.machine()}, {_cores()} cores, {platform.system()}",
        "date": date.today().isoformat(),
        "versions": ", ".join(
            [f"python {platform.python_version()}"] + [f"{p} {version(p)}" for p in packages]
        ),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def win_bars(result: Comparison) -> list[Html]:
    """The answers to both questions, and what faithfulness won or lost."""
    appeal, faithfulness = result.appeal, result.faithfulness
    detail = f"{appeal.num_prompts} prompts, equal seeds"
    return [
        report.win_bar(APPEAL_QUESTION, appeal, detail=detail),
        report.win_bar(FAITHFULNESS_QUESTION, faithfulness, detail=detail),
        report.difference_bar("Faithfulness, win minus lose", faithfulness, detail=detail, margin=0.03),
    ]


def grid(
    result: Comparison,
    pictures: Mapping[str, Pictures] | Mapping[str, PictureFolder],
    prompts: Sequence[str],
    rows: NDArray[np.intp],
) -> Html:
    """Base and tuned pictures of some prompts, with the judge's appeal."""
    scores = {"base": result.base_appeal, "tuned": result.tuned_appeal}
    return report.figure_grid(
        {name: [images[int(row)] for row in rows] for name, images in pictures.items()},
        [prompts[i] for i in rows],
        scores={name: values[rows] for name, values in scores.items()},
    )


def evenly(num: int, wanted: int) -> NDArray[np.intp]:
    """Every so-many-th of ``num``, ``wanted`` of them where there are as many."""
    return np.unique(np.linspace(0, num - 1, min(num, wanted)).round().astype(np.intp))


def worst(result: Comparison, wanted: int) -> NDArray[np.intp]:
    """Prompts the tuned model lost, the greatest losses of faithfulness first, then of appeal."""
    faithfulness = result.tuned_faithfulness - result.base_faithfulness
    appeal = result.tuned_appeal - result.base_appeal
    lost = (result.faithfulness_labels == "A") | (result.appeal_labels == "A")
    order = np.lexsort((appeal, faithfulness))
    return order[lost[order]][:wanted]


def _by(names: Sequence[str], result: Comparison, prompts: Sequence[str]) -> Mapping[str, Any]:
    return win_rates_by(names, result.appeal_labels, of="B", prompts=prompts)
