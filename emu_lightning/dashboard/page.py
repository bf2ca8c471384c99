"""The page: what the runs answer, where to stop, their pictures, curves and settings; and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from emu_lightning.dashboard.ablations import (
    SEED_KEYS,
    Answer,
    Answered,
    Estimate,
    Metric,
    answers,
    varied,
)
from emu_lightning.dashboard.runs import RunRecord
from emu_lightning.dashboard.stopping import (
    DRIFTS,
    LOSSES,
    MEASURES,
    SHARES,
    StopTable,
    read_stops,
)
from emu_lightning.evaluation import report
from emu_lightning.evaluation.comparison_page import environment, evenly
from emu_lightning.evaluation.generation import PictureFolder
from emu_lightning.evaluation.report import Html, Reading, Section, Series

NUM_PROMPTS, NUM_COLUMNS, NUM_LINES = 6, 6, 6
THROUGHPUT = "speed/images_per_second_per_device"
CURVES = {**LOSSES, THROUGHPUT: "pictures a second on a device"}


class Dashboard:
    """Everything that is said of some runs: as figures, and as a page.

    Args:
        runs: with names that differ.
    """

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self.runs = runs
        self.groups = dict(_groups(runs))
        self.answers = answers(runs)
        # Runs that differ in nothing but their seeds are replicates of one tuning.
        self.stops = {
            name: table
            for name, members in _replicates(self.groups)
            if (table := read_stops(members)) is not None
        }

    def results(self, command: str) -> dict[str, Any]:
        """For results.json."""
        return {
            "command": command,
            **environment(),
            "ablations": {answer.ablation.key: _figures(answer) for answer in self.answers},
            "stopping": {name: _stop_figures(table) for name, table in self.stops.items()},
            "runs": [
                {
                    "name": run.name,
                    "sweep": run.sweep,
                    "state": run.state,
                    "seconds": run.seconds,
                    "settings": {
                        key: run.config.get(key) for key in _shown_settings(self.groups[_group(run)])
                    },
                    "last": run.last,
                }
                for run in self.runs
            ],
        }

    def page(self, title: str, command: str, facts: Mapping[str, str]) -> Html:
        """The document."""
        sections = [
            Section(each.ablation.title, _answer(each), each.ablation.caveat) for each in self.answers
        ]
        sections += [_stopping(name, table) for name, table in self.stops.items()]
        for heading, intro, draw in (
            (
                "Pictures",
                "Held-out prompts, evenly spaced, not chosen; equal seeds in all columns.",
                _pictures,
            ),
            (
                "Runs",
                "Settings in which the runs differ, and the last value of what was measured.",
                _settings,
            ),
            ("Curves", "Means over the runs that differ in seeds only.", _curves),
        ):
            pieces = [piece for name, runs in self.groups.items() for piece in draw(name, runs)]
            sections += [Section(heading, pieces, intro)] if pieces else []
        sections.append(
            Section("How this was made", [report.provenance(command, {**environment(), **facts})])
        )
        return report.page(
            title,
            self._sentence(),
            sections,
            remark="Emu’s own figures are marked: in the paper’s text, or recalled from it without a check.",
        )

    def _sentence(self) -> str:
        verdicts = Counter(each.difference.verdict for answer in self.answers for each in answer.claims)
        verdicts += Counter(each.verdict for table in self.stops.values() for each in table.drifts.values())
        states = Counter(run.state for run in self.runs)
        ended = ", ".join(f"{num} {state}" for state, num in states.items())
        if not verdicts:
            return f"{len(self.runs)} runs: {ended}."
        return (
            f"Of the paper’s trends these runs can show, {verdicts['holds']} of {verdicts.total()} hold; "
            f"not: {verdicts['does not hold']}; not settled: {verdicts['not settled']} "
            f"({len(self.runs)} runs: {ended})."
        )


def _group(run: RunRecord) -> str:
    return run.sweep or run.name


def _groups(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[RunRecord]]]:
    """Sweeps; a training by itself is a group of its own."""
    for name in dict.fromkeys(map(_group, runs)):
        yield name, [run for run in runs if _group(run) == name]


def _replicates(groups: Mapping[str, Sequence[RunRecord]]) -> Iterator[tuple[str, list[RunRecord]]]:
    for name, runs in groups.items():
        finished = [run for run in runs if run.state == "finished"]
        if finished and not varied(finished):
            yield name, finished


def _shown_settings(runs: Sequence[RunRecord]) -> list[str]:
    """What varies, seeds last."""
    seeds = [key for key in SEED_KEYS if len({run.config[key] for run in runs if key in run.config}) > 1]
    return [*varied(runs), *seeds]


# --- ablations -------------------------------------------------------------------------------------------


def _answer(answer: Answer) -> list[Html]:
    pieces = [_claims(answer.claims)] if answer.claims else []
    measured = answer.measured
    pieces.append(report.columns(*(_chart(answer, metric) for metric in measured[:4])))
    pieces.append(_points(answer, measured))
    return pieces


def _claims(claims: Sequence[Answered]) -> Html:
    return report.table(
        ["the paper’s trend", "here", "difference", "95 % interval", "seeds"],
        [
            [
                each.claim.statement,
                each.difference.verdict,
                _text(each.difference.mean, each.metric, is_difference=True),
                _interval(each.difference, each.metric, is_difference=True),
                each.difference.seeds,
            ]
            for each in claims
        ],
        right=(2, 3),
    )


def _chart(answer: Answer, metric: Metric) -> Html:
    paper = metric.paper or {}
    sources = " and ".join(dict.fromkeys(each.source for each in paper.values()))
    readings = []
    for point in answer.points:
        if (estimate := point.estimates.get(metric.name)) is None:
            continue
        singles = [
            run.last[metric.name]
            for run in answer.runs
            if answer.ablation.value(run.config) == point.value and metric.name in run.last
        ]
        reported = paper[point.value].value if point.value in paper else None
        readings.append(Reading(point.value, estimate.mean, estimate.ci95, singles, reported))
    return report.interval_chart(
        metric.label,
        readings,
        x_label=answer.ablation.x_label,
        unit="%" if metric.unit else "",
        reported=f"Emu’s, {sources}: {metric.paper_is}",
    )


def _points(answer: Answer, metrics: Sequence[Metric]) -> Html:
    heads = [answer.ablation.x_label]
    rows: list[list[str | float]] = [[point.value] for point in answer.points]
    for metric in metrics:
        heads.append(metric.label)
        for row, point in zip(rows, answer.points, strict=True):
            estimate = point.estimates.get(metric.name)
            row.append(f"{_text(estimate.mean, metric)} ({_interval(estimate, metric)})" if estimate else "—")
        if metric.paper:
            heads.append("Emu’s")
            for row, point in zip(rows, answer.points, strict=True):
                reported = metric.paper.get(point.value)
                row.append(f"{_text(reported.value, metric)}, {reported.source}" if reported else "—")
    heads += ["seeds", "seconds a run"]
    for row, point in zip(rows, answer.points, strict=True):
        row += [
            next(iter(point.estimates.values())).seeds,
            "—" if point.seconds is None else round(point.seconds),
        ]
    return report.table(heads, rows, right=range(1, len(heads)))


def _text(value: float, metric: Metric, is_difference: bool = False) -> str:
    if metric.unit == "points" or (metric.unit and is_difference):
        return report.points(value)
    if metric.unit == "%":
        return report.percent(value)
    text = report.number(value, 2 if abs(value) >= 1 else 3)
    return f"+{text}" if is_difference and value > 0 else text


def _interval(estimate: Estimate, metric: Metric, is_difference: bool = False) -> str:
    if estimate.ci95 is None:
        return "one seed"
    return " to ".join(_text(end, metric, is_difference) for end in estimate.ci95)


def _figures(answer: Answer) -> dict[str, Any]:
    first = answer.measured[0]
    return {
        "question": answer.ablation.title,
        "varied": answer.ablation.x_label,
        "metric": first.name,
        "points": [
            {
                "value": point.value,
                **(asdict(point.estimates[first.name]) if first.name in point.estimates else {}),
                "seconds": point.seconds,
                "metrics": {name: asdict(estimate) for name, estimate in point.estimates.items()},
            }
            for point in answer.points
        ],
        "trends": [
            {
                "statement": each.claim.statement,
                "metric": each.metric.name,
                "verdict": each.difference.verdict,
                **asdict(each.difference),
            }
            for each in answer.claims
        ],
        "paper": {
            metric.name: {value: asdict(each) for value, each in metric.paper.items()}
            | {"of": metric.paper_is}
            for metric in answer.ablation.metrics
            if metric.paper
        },
    }


# --- stopping --------------------------------------------------------------------------------------------


def _stopping(name: str, table: StopTable) -> Section:
    seeds = f"{len(table.runs)} runs" if len(table.runs) > 1 else "one run"
    chosen = (
        f"Stop after {table.stop:,} steps: {table.reason}."
        if table.stop is not None
        else f"No stop can be chosen: {table.reason}."
    )
    labels = MEASURES | LOSSES
    charts = [
        report.line_chart(
            labels[each],
            [_line(labels[each], table.steps, estimates)],
            x_label="iteration",
            unit="%" if each in SHARES else "",
            stop=table.stop,
        )
        for each, estimates in table.estimates.items()
    ]
    names = list(table.estimates)
    pieces = [_drifts(table)] if table.drifts else []
    pieces.append(report.columns(*charts))
    rows: list[list[str | float]] = [
        [
            step,
            *(
                "—" if each is None else _stop_text(key, each.mean)
                for key, each in zip(names, row, strict=True)
            ),
        ]
        for step, row in zip(table.steps, zip(*table.estimates.values(), strict=True), strict=True)
    ]
    heads = ["iteration", *(labels[each] for each in names)]
    pieces.append(report.table(heads, rows, right=range(1, len(heads))))
    return Section(
        f"When to stop: {name}", pieces, f"{chosen} Means over {seeds}, against the start of tuning."
    )


def _drifts(table: StopTable) -> Html:
    rows: list[list[str | float]] = []
    for statement, measure, _ in DRIFTS:
        if (each := table.drifts.get(statement)) is None:
            continue
        ends = [_stop_text(measure, end) for end in each.ci95 or ()]
        rows.append([statement, each.verdict, _stop_text(measure, each.mean), " to ".join(ends) or "one run"])
    heads = [f"from step {table.since:,} to {table.steps[-1]:,}", "here", "change", "95 % interval"]
    return report.table(heads, rows, right=(2, 3))


def _stop_text(measure: str, value: float) -> str:
    return report.points(value) if measure in SHARES else f"{value:.3g}".replace("-", "−")


def _line(name: str, steps: Sequence[int], estimates: Sequence[Estimate | None]) -> Series:
    missing = (np.nan, np.nan)
    y = [np.nan if each is None else each.mean for each in estimates]
    ends = [missing if each is None else each.ci95 or (each.mean, each.mean) for each in estimates]
    return Series(name, list(steps), y, ([low for low, _ in ends], [high for _, high in ends]))


def _stop_figures(table: StopTable) -> dict[str, Any]:
    return {
        "stop": table.stop,
        "reason": table.reason,
        "runs": list(table.runs),
        "points": [
            {
                "value": step,
                **{name: asdict(each) for name, column in table.estimates.items() if (each := column[i])},
            }
            for i, step in enumerate(table.steps)
        ],
        "since": table.since,
        "drifts": {
            statement: {"verdict": each.verdict, **asdict(each)} for statement, each in table.drifts.items()
        },
    }


# --- what is shown of any runs ---------------------------------------------------------------------------


def _pictures(name: str, runs: Sequence[RunRecord]) -> Iterator[Html]:
    columns = _columns(runs)
    shared = {pictures.prompts for pictures in columns.values()}
    if len(shared) != 1:
        return
    prompts = next(iter(shared))
    rows = evenly(len(prompts), NUM_PROMPTS)
    shown = evenly(len(columns), NUM_COLUMNS)
    labels = [label for index, label in enumerate(columns) if index in shown]
    left_out = "" if len(labels) == len(columns) else f"{len(labels)} of {len(columns)}, evenly spaced."
    yield report.heading(name, left_out)
    yield report.figure_grid(
        {label: [columns[label][int(row)] for row in rows] for label in labels},
        [prompts[row] for row in rows],
    )


def _columns(runs: Sequence[RunRecord]) -> dict[str, PictureFolder]:
    """By what sets runs apart, the first of replicates; where nothing does, the stops of the first run."""
    groups = _by_settings(runs)
    if len(groups) == 1:
        first = next((run for run in runs if run.pictures_at), None)
        return {f"iteration {step}": each for step, each in first.pictures_at.items()} if first else {}
    firsts = {
        label: next((run.pictures for run in each if run.pictures), None) for label, each in groups.items()
    }
    return {label: pictures for label, pictures in firsts.items() if pictures is not None}


def _settings(name: str, runs: Sequence[RunRecord]) -> Iterator[Html]:
    keys = _shown_settings(runs)
    measured = _measured(runs)
    yield report.heading(name)
    begun = [run for run in runs if run.last]
    if len(begun) > 1 and (differing := varied(begun)):
        axes: dict[str, list[float | str | None]] = {
            _short(key): [_plain(run.config.get(key)) for run in begun] for key in differing
        }
        axes |= {_short(metric): [run.last.get(metric) for run in begun] for metric in measured[:5]}
        labels = [_label(run, begun) for run in begun]
        yield report.parallel_chart("Settings and what came of them", axes, labels)
    heads = ["run", "state", *map(_short, keys), *map(_short, measured), "seconds"]
    yield report.table(
        heads,
        [
            [
                run.name,
                run.state,
                *(str(_plain(run.config[key])) if key in run.config else "—" for key in keys),
                *("—" if metric not in run.last else f"{run.last[metric]:.4g}" for metric in measured),
                "—" if run.seconds is None else f"{run.seconds:,.0f}",
            ]
            for run in runs
        ],
        right=range(2, len(heads)),
    )


def _curves(name: str, runs: Sequence[RunRecord]) -> Iterator[Html]:
    groups = _by_settings(runs)
    charts = []
    for metric, label in CURVES.items():
        lines = [line for value, members in groups.items() if (line := _mean_line(value, metric, members))]
        if lines:
            detail = "" if len(lines) <= NUM_LINES else f"the first {NUM_LINES} of {len(lines)}"
            charts.append(report.line_chart(label, lines[:NUM_LINES], x_label="iteration", detail=detail))
    if charts:
        yield report.heading(name)
        yield report.columns(*charts)


def _mean_line(name: str, metric: str, runs: Sequence[RunRecord]) -> Series | None:
    """Over the steps that all of the runs have; None where there is none."""
    curves = [dict(zip(*_pair(run, metric), strict=True)) for run in runs if metric in run.curves]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    return Series(name, steps, [float(np.mean([curve[step] for curve in curves])) for step in steps])


def _pair(run: RunRecord, metric: str) -> tuple[list[int], list[float]]:
    curve = run.curves[metric]
    return curve.steps.tolist(), curve.values.tolist()


def _by_settings(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Replicates together, by what sets them apart from the others."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(_label(run, runs), []).append(run)
    return groups


def _label(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    keys = varied(runs)
    return ", ".join(f"{_short(key)} {_plain(run.config.get(key))}" for key in keys) or "all"


def _measured(runs: Sequence[RunRecord]) -> list[str]:
    """What was measured of the result; what is left out can be seen among the curves."""
    names = dict.fromkeys(name for run in runs for name in run.last)
    wanted = [name for name in names if name.startswith(("held_out/", "val/"))]
    return wanted or [name for name in names if name.startswith(("tune/", "train/"))]


def _short(key: str) -> str:
    """The last part, in words that a column's head can break between."""
    return (key.rpartition("/")[2] if "/" in key else key.rpartition(".")[2]).replace("_", " ")


def _plain(value: Any) -> float | str:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
