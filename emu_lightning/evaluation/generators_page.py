"""The page on which a person reads what quality-tuning did to several generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emu_lightning.evaluation import report
from emu_lightning.evaluation.comparison import Comparison
from emu_lightning.evaluation.comparison_page import (
    APPEAL_QUESTION,
    LOST,
    NOT_CHOSEN,
    Pictures,
    environment,
    evenly,
    grid,
    win_bars,
    worst,
)
from emu_lightning.evaluation.report import Html, Section


@dataclass(frozen=True)
class Tuned:
    """A generator's base and tuned self on the page's prompts.

    ``pictures`` and ``faithfulness`` (share of the prompts whose picture shows all three facts) are of `base`
    and of `tuned`; ``seconds`` of everything from the pool on; ``stop`` is the chosen iteration; ``details``
    are pieces of its own section.
    """

    title: str
    result: Comparison
    pictures: Mapping[str, Pictures]
    faithfulness: Mapping[str, float]
    seconds: float
    num_parameters: int
    stop: int
    details: Sequence[Html] = ()


def generators_page(
    title: str,
    generators: Mapping[str, Tuned],
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, str],
    sections: Sequence[Section] = (),
    judge: str,
) -> Html:
    """Headline, table, all generators on the same prompts, each by itself, settings, provenance.

    Args:
        title: of the page.
        generators: by their short names.
        prompts: the N prompts, the same for all.
        settings: everything that was set; folded.
        command: what made this page.
        facts: name and value of what else made it.
        sections: shown between the generators and the settings.
        judge: who judged, in the remark under the headline.
    """
    body = [
        Section("Result", [_table(generators), *_bars(generators)]),
        Section(
            "Side by side", [_side_by_side(generators, prompts)], f"Base above, tuned below. {NOT_CHOSEN}"
        ),
        *(Section(each.title, _by_itself(each, prompts)) for each in generators.values()),
        *sections,
        Section("Settings", [report.settings(settings)]),
        Section("How this was made", [report.provenance(command, {**environment(), **facts})]),
    ]
    rates = {name: (each.result.appeal, each.result.faithfulness) for name, each in generators.items()}
    remark = f"Each against its own base, at equal prompts and seeds. Judged by {judge}."
    return report.page(title, report.headline_of_several(rates), body, remark=remark)


def _table(generators: Mapping[str, Tuned]) -> Html:
    heads = ["generator", "appeal, wins", "95 % interval", "faithfulness, win − lose", "95 % interval"]
    heads += ["base shows all facts", "tuned", "stop", "parameters", "seconds"]
    return report.table(
        heads,
        [
            [
                name,
                report.percent(each.result.appeal.win),
                report.percent_interval(each.result.appeal.ci95),
                report.points(each.result.faithfulness.win_minus_lose),
                report.points_interval(each.result.faithfulness.win_minus_lose_ci95),
                *(report.percent(each.faithfulness[model]) for model in ("base", "tuned")),
                each.stop,
                f"{each.num_parameters / 1e6:.2f} M",
                round(each.seconds),
            ]
            for name, each in generators.items()
        ],
    )


def _bars(generators: Mapping[str, Tuned]) -> list[Html]:
    return [
        report.win_bar(f"{each.title}: {APPEAL_QUESTION}", each.result.appeal) for each in generators.values()
    ]


def _side_by_side(generators: Mapping[str, Tuned], prompts: Sequence[str]) -> Html:
    rows = evenly(len(prompts), 12)
    appeal = {
        name: {"base": each.result.base_appeal, "tuned": each.result.tuned_appeal}
        for name, each in generators.items()
    }
    columns = [(name, model) for model in ("base", "tuned") for name in generators]
    return report.figure_grid(
        {f"{name}, {model}": generators[name].pictures[model][rows] for name, model in columns},
        [prompts[i] for i in rows],
        scores={f"{name}, {model}": appeal[name][model][rows] for name, model in columns},
        num_columns=len(generators),
    )


def _by_itself(each: Tuned, prompts: Sequence[str]) -> list[Html]:
    lost = worst(each.result, 6)
    pieces = [*win_bars(each.result)[1:], *each.details]
    if len(lost):
        pieces += [report.heading("Where tuning lost", LOST), grid(each.result, each.pictures, prompts, lost)]
    return pieces
