"""One self-contained page a person reads, and ``results.json`` beside it that a command checks.

The page is put together from small pieces, each a plain function that returns HTML: key figures, bars with
their intervals, line charts, picture grids, tables. It needs no script and no network. Charts are drawn in
percentages of their box, so that their lettering stays readable from a phone to a wide screen.

A piece takes plain text and escapes it; only :class:`Html`, which pieces return, is taken as it is.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from emu_lightning.evaluation.votes import Interval, WinRate
from emu_lightning.files import write_whole

Pictures = NDArray[np.uint8]

_NUM_COLOURS = 6  # series colours in report.css
_CHART_HEIGHT = 220  # pixels
_SHOWN_SIDE = 144  # pixels a small picture is about enlarged to
_LOSSLESS_SIDE, _MAX_SIDE = 128, 256  # pixels; larger pictures become JPEG, and are reduced
_MAX_DOTS = 24  # so many points of a line are single measurements worth seeing


class Html(str):
    """Text that is HTML already and is not escaped again."""


def join(*parts: str) -> Html:
    """Pieces one after the other; plain text among them is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def tag(name: str, *content: str, **attributes: object) -> Html:
    """An element; ``css`` is its class, and underscores in names become hyphens."""
    written = "".join(
        f' {"class" if key == "css" else key.replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value != ""
    )
    return Html(f"<{name}{written}>" + ("" if name == "img" else f"{join(*content)}</{name}>"))


# --- figures in words ------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    """0.829 -> 82.9 %, with a space that does not break."""
    return f"{number(100 * share, digits)}\u00a0%"


def points(difference: float, digits: int = 1) -> str:
    """0.012 -> +1.2: a difference of two shares in percentage points, always with its sign."""
    text = number(100 * difference, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def percent_interval(ci95: Interval, digits: int = 1) -> str:
    """(0.81, 0.847) -> 81.0 to 84.7 %."""
    return f"{number(100 * ci95[0], digits)} to {percent(ci95[1], digits)}"


def points_interval(ci95: Interval, digits: int = 1) -> str:
    """(-0.009, 0.033) -> −0.9 to +3.3."""
    return f"{points(ci95[0], digits)} to {points(ci95[1], digits)}"


def p_value(p: float) -> str:
    """0.0371 -> 0.037; never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float, digits: int) -> str:
    """-1234.5 -> −1,234.5: with a true minus sign, and none before zero."""
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def headline(
    appeal: WinRate, faithfulness: WinRate, *, tuned: str = "tuned model", margin: float = 0.03
) -> Html:
    """The result in one sentence, as good or as bad as the intervals allow.

    Args:
        appeal: wins of the tuned model; preferred only where the interval of win minus lose is above 0.
        faithfulness: the same for faithfulness; "no worse" only where its interval is above ``-margin``.
        tuned: what the tuned model is called.
        margin: the share of prompts that may be lost without calling it a loss.
    """
    is_preferred, is_worse = _preference(appeal)
    opening = (
        "" if is_preferred else "Tuning made the pictures worse: " if is_worse else "No clear preference: "
    )
    is_faithful, verdict = _verdict(faithfulness, margin)
    link = "and" if is_preferred == is_faithful else "but"
    num = (
        f"{appeal.num_prompts:,} prompts"
        if appeal.num_labels == appeal.num_prompts
        else f"{appeal.num_labels:,} pairs for {appeal.num_prompts:,} prompts"
    )
    return join(
        opening,
        "the" if opening else "The",
        f" {tuned}’s picture wins ",
        tag("strong", percent(appeal.win)),
        f" of {num} on appeal ",
        tag("small", f"(95\u00a0% interval {percent_interval(appeal.ci95)})"),
        f", {link} {verdict} ",
        tag(
            "small",
            f"(win minus lose {points(faithfulness.win_minus_lose)} points, 95\u00a0% interval "
            f"{points_interval(faithfulness.win_minus_lose_ci95)})",
        ),
        ".",
    )


def headline_of_several(rates: Mapping[str, tuple[WinRate, WinRate]], *, margin: float = 0.03) -> Html:
    """The results of several tuned models in a sentence or two, under the conditions of :func:`headline`.

    Args:
        rates: model -> its appeal and its faithfulness, each against its own base, on the same prompts.
        margin: as for :func:`headline`.
    """
    num_preferred = sum(_preference(appeal)[0] for appeal, _ in rates.values())
    num_prompts = next(appeal.num_prompts for appeal, _ in rates.values())
    wins = [
        join(
            f", {name} " if i else f"{name} wins ",
            tag("strong", percent(appeal.win)),
            tag("small", f" ({percent_interval(appeal.ci95)})"),
        )
        for i, (name, (appeal, _)) in enumerate(rates.items())
    ]
    verdicts = [f"{name} {_verdict(faithfulness, margin)[1]}" for name, (_, faithfulness) in rates.items()]
    return join(
        f"Tuned pictures are preferred to their base’s for {num_preferred} of {len(rates)} generators: ",
        *wins,
        f" of {num_prompts:,} prompts on appeal; {', '.join(verdicts)}.",
    )


def _preference(appeal: WinRate) -> tuple[bool, bool]:
    """Whether the interval of win minus lose is above 0, and whether it is below."""
    low, high = appeal.win_minus_lose_ci95
    return low > 0, high < 0


def _verdict(faithfulness: WinRate, margin: float) -> tuple[bool, str]:
    """Whether no more than ``margin`` of the prompts can have been lost, and what may be said of it."""
    low, high = faithfulness.win_minus_lose_ci95
    if high >= 0 and low >= -margin:
        return True, "follows the prompts better" if low > 0 else "follows the prompts no worse"
    if high < 0:
        return False, "follows the prompts less well"
    return False, f"may lose more than {100 * margin:g} points of faithfulness to the prompts"


@dataclass(frozen=True)
class Figure:
    """One key figure on a card. ``detail`` is its interval, or why there is no value."""

    label: str
    value: str
    detail: str = ""


def key_figures(figures: Sequence[Figure]) -> Html:
    """Cards side by side."""
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", one.label),
                tag("dd", one.value, css="value"),
                tag("dd", one.detail, css="small muted"),
            )
            for one in figures
        ),
        css="cards",
    )


# --- bars and whiskers -----------------------------------------------------------------------------------


def win_bar(
    title: str,
    rate: WinRate,
    *,
    detail: str = "",
    names: tuple[str, str] = ("base", "tuned"),
    references: Sequence[tuple[str, float]] = (),
) -> Html:
    """Wins, ties and losses as one bar of all prompts, with the interval of the win rate at its edge.

    Args:
        title: the question.
        rate: of the second of ``names``.
        detail: who judged, how many.
        names: the two models, base first.
        references: (label, share) lines from elsewhere; the label has to say whose figure it is.
    """
    base, tuned = names
    words = {
        "win": f"{tuned} wins {percent(rate.win)} ({percent_interval(rate.ci95)})",
        "tie": f"tie {percent(rate.tie)}",
        "lose": f"{base} wins {percent(rate.lose)}",
    }
    legend = [tag("span", tag("i", css=outcome), text) for outcome, text in words.items()]
    legend += [tag("span", f"┆ {label} {percent(share)}", css="narrow") for label, share in references]
    top, height = 20 * len(references), 36
    bottom = top + height
    stretches = (("win", 0.0, rate.win), ("tie", rate.win, rate.tie), ("lose", 1 - rate.lose, rate.lose))
    drawing = [
        tag("rect", css=outcome, x=_pc(start), y=top, width=_pc(share), height=height)
        for outcome, start, share in stretches
    ]
    drawing += [
        _text(x, bottom + 18, percent(x, 0) if x == 1 else f"{100 * x:g}", anchor=_anchor(x))
        for x in (0, 0.25, 0.5, 0.75, 1)
    ]
    for row, (label, share) in enumerate(references):
        anchor, dx = ("end", -6) if share > 0.5 else ("start", 6)
        text = f"{label} {percent(share)}"
        drawing += [
            _vertical(share, 20 * row, bottom + 4, "mark"),
            _text(share, 20 * row + 11, text, anchor=anchor, css="wide", dx=dx),
        ]
    drawing += _whisker(rate.ci95, top + height / 2)
    return _figure(
        title,
        detail,
        tag("p", *legend, css="legend"),
        _svg(f"{title}: {'; '.join(words.values())}", bottom + 24, drawing),
    )


def difference_bar(title: str, rate: WinRate, *, detail: str = "", margin: float | None = None) -> Html:
    """Win minus lose as a point with its interval, between losing more (left) and winning more (right).

    Args:
        title: the question.
        rate: of the tuned model.
        detail: who judged, how many.
        margin: a loss that would still be accepted, drawn as a line at ``-margin``.
    """
    low, high = rate.win_minus_lose_ci95
    end = min(1.0, round(_ticks(0, max(abs(low), abs(high), 2 * (margin or 0), 0.02))[-1], 6))

    def at(difference: float) -> float:
        return (difference / end + 1) / 2

    drawing = [
        tag("line", css="axis", x1="0", x2="100%", y1=40, y2=40),
        _vertical(at(0), 20, 60, "zero"),
        _text(0, 11, "← loses more", css="wide"),
        _text(1, 11, "wins more →", anchor="end", css="wide"),
    ]
    if margin is not None:
        drawing += [
            _vertical(at(-margin), 20, 60, "mark"),
            _text(at(-margin), 11, f"limit {points(-margin, 0)}", anchor="middle"),
        ]
    digits = 0 if (50 * end).is_integer() else 1
    drawing += [
        _text(at(x), 80, points(x, digits), anchor=_anchor(at(x))) for x in (-end, -end / 2, 0, end / 2, end)
    ]
    drawing += [*_whisker((at(low), at(high)), 40), _dot(at(rate.win_minus_lose), 40)]
    words = f"{points(rate.win_minus_lose)} points ({points_interval((low, high))})"
    return _figure(
        title,
        detail,
        tag("p", tag("span", f"win minus lose {words}"), css="legend"),
        _svg(f"{title}: {words}", 86, drawing),
    )


# --- charts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line. ``y`` is NaN where nothing was measured; ``ci95`` is (lower, upper), each like ``y``."""

    name: str
    x: ArrayLike
    y: ArrayLike
    ci95: tuple[ArrayLike, ArrayLike] | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    detail: str = "",
    unit: Literal["", "%"] = "",
    stop: float | None = None,
) -> Html:
    """Lines with their 95 % bands, each named at its end.

    Args:
        title: what is measured.
        series: up to six lines over the same kind of ``x``.
        x_label: what ``x`` counts.
        detail: a remark beside the title.
        unit: ``%`` for shares in [0, 1].
        stop: the chosen ``x``, marked by a line.
    """
    if not 1 <= len(series) <= _NUM_COLOURS:
        raise ValueError(f"chart {title!r} has {len(series)} lines: draw 1 to {_NUM_COLOURS}")
    lines = [_measured(one, title) for one in series]
    xs = np.concatenate([line.x for line in lines])
    xs = np.append(xs, [] if stop is None else [stop])
    ys = np.concatenate([part for line in lines for part in (line.y, line.lower, line.upper)])
    x_ticks, y_ticks = _ticks(xs.min(), xs.max()), _ticks(np.nanmin(ys), np.nanmax(ys))
    left, width = xs.min(), np.ptp(xs) or 1.0
    top, height = y_ticks[-1], y_ticks[-1] - y_ticks[0]

    def across(x: Any) -> Any:
        return (x - left) / width

    def down(y: Any) -> Any:
        return (top - y) / height

    frame = [_text(0.5, _CHART_HEIGHT + 40, x_label, anchor="middle")]
    for tick in y_ticks:
        at = round(_CHART_HEIGHT * down(tick), 1)
        frame += [
            tag("line", css="axis", x1="0", x2="100%", y1=at, y2=at),
            _text(0, at + 4, _tick_label(tick, y_ticks, unit), anchor="end", dx=-8),
        ]
    frame += [
        _text(across(tick), _CHART_HEIGHT + 20, _tick_label(tick, x_ticks), anchor="middle")
        for tick in x_ticks
        if left <= tick <= left + width
    ]
    if stop is not None:
        at = across(stop)
        frame += [
            _vertical(at, -6, _CHART_HEIGHT, "mark"),
            _text(at, -12, f"chosen stop {stop:,.0f}", anchor=_anchor(at), css="ink"),
        ]

    paths, dots, ends, legend = [], [], [], []
    for index, line in enumerate(lines):
        colour = f"var(--series-{index})"
        held = np.isfinite(line.lower) & np.isfinite(line.upper)
        there, back = line.x[held], line.x[held][::-1]
        band = _path(
            across(np.append(there, back)), down(np.append(line.upper[held], line.lower[held][::-1]))
        )
        paths += [
            tag("path", css="band", fill=colour, d=f"{band}Z"),
            tag(
                "path",
                css="line",
                stroke=colour,
                vector_effect="non-scaling-stroke",
                d=_path(across(line.x), down(line.y)),
            ),
        ]
        seen = np.flatnonzero(np.isfinite(line.y))
        heights = np.round(_CHART_HEIGHT * down(line.y), 1)
        dots += [
            tag("circle", cx=_pc(across(line.x[i])), cy=heights[i], r=3.5, fill=colour)
            for i in (seen if len(seen) <= _MAX_DOTS else seen[-1:])
        ]
        ends.append(float(heights[seen[-1]]))
        legend.append(tag("span", tag("i", style=f"background:{colour}"), line.name))
    labels = [
        _text(1, at + 4, line.name, css="wide name", dx=12, style=f"fill:var(--series-{index})")
        for index, (at, line) in enumerate(zip(_apart(ends), lines, strict=True))
        if len(lines) > 1  # else the title says it
    ]
    stretched = tag(
        "svg", *paths, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=_CHART_HEIGHT
    )
    chart = _svg(
        f"{title} against {x_label}: {', '.join(line.name for line in lines)}",
        _CHART_HEIGHT,
        [*frame, stretched, *dots, *labels],
    )
    if len(lines) == 1:
        return _figure(title, detail, tag("div", chart, css="chart plain"))
    return _figure(title, detail, tag("div", tag("p", *legend, css="legend narrow"), chart, css="chart"))


@dataclass(frozen=True)
class Reading:
    """What was measured at one place of an :func:`interval_chart`.

    Args:
        name: of the place.
        value: the mean.
        ci95: of the mean; None where it is not known.
        singles: what the mean is of.
        reported: what somebody else reports there.
    """

    name: str
    value: float
    ci95: Interval | None = None
    singles: Sequence[float] = ()
    reported: float | None = None


def interval_chart(
    title: str, readings: Sequence[Reading], *, x_label: str, unit: Literal["", "%"] = "", reported: str = ""
) -> Html:
    """Means with their 95 % intervals, one beside the other; every single measurement is a small dot.

    Args:
        title: what is measured.
        readings: from left to right; distances between them mean nothing.
        x_label: what their names are.
        unit: ``%`` for shares in [0, 1].
        reported: whose the other figures are, drawn as rings.
    """
    shown = [
        y
        for one in readings
        for y in (one.value, *(one.ci95 or ()), *one.singles, one.reported)
        if y is not None
    ]
    ticks = _ticks(min(shown), max(shown))

    def down(y: float) -> float:
        return round(_CHART_HEIGHT * (ticks[-1] - y) / (ticks[-1] - ticks[0]), 1)

    drawing = [_text(0.5, _CHART_HEIGHT + 40, x_label, anchor="middle")]
    for tick in ticks:
        drawing += [
            tag("line", css="axis", x1="0", x2="100%", y1=down(tick), y2=down(tick)),
            _text(0, down(tick) + 4, _tick_label(tick, ticks, unit), anchor="end", dx=-8),
        ]
    for index, one in enumerate(readings):
        at = (index + 0.5) / len(readings)
        drawing.append(_text(at, _CHART_HEIGHT + 20, one.name, anchor="middle"))
        if one.ci95 is not None:
            y1, y2 = map(down, one.ci95)
            drawing.append(tag("line", css="whisker", x1=_pc(at), x2=_pc(at), y1=y1, y2=y2))
        drawing.append(_dot(at, down(one.value)))
        drawing += [tag("circle", css="single", cx=_pc(at), cy=down(y), r=2) for y in one.singles]
        if one.reported is not None:
            drawing.append(tag("circle", css="point reported", cx=_pc(at), cy=down(one.reported), r=5))
    legend = [tag("span", f"○ {reported}")] if any(one.reported is not None for one in readings) else []
    words = ", ".join(f"{one.name}: {one.value:.4g}" for one in readings)
    chart = tag("div", _svg(f"{title}; {words}", _CHART_HEIGHT, drawing), css="chart plain")
    return _figure(title, "", tag("p", *legend, css="legend"), chart)


def parallel_chart(
    title: str, axes: Mapping[str, Sequence[float | str | None]], groups: Sequence[str], *, detail: str = ""
) -> Html:
    """A line for each run through all axes: settings on the left, what came of them on the right.

    Args:
        title: what is shown.
        axes: name -> a value for each run; texts stand in the order in which they come. A line has a gap
            where there is None.
        groups: for each run the name that gives it its colour.
        detail: a remark beside the title.
    """
    names = list(dict.fromkeys(groups))
    colour = {name: f"var(--series-{index % _NUM_COLOURS})" for index, name in enumerate(names)}
    places = np.linspace(0, 1, len(axes)) if len(axes) > 1 else np.array([0.5])
    heights, drawing = [], []
    for index, ((name, values), at) in enumerate(zip(axes.items(), places, strict=True)):
        y, marks = _on_axis(values)
        heights.append(y)
        side, dx = ("start", 6) if at < 0.5 else ("end", -6)
        drawing += [
            _vertical(at, 0, _CHART_HEIGHT, "zero"),
            # Neighbours' names stand at two heights, so that long ones do not meet.
            _text(at, -12 - 18 * (index % 2), name, anchor=_anchor(at), css="ink"),
            # Inside the frame, off the lines that run along its edges.
            *(_text(at, 15 + (_CHART_HEIGHT - 21) * y, mark, anchor=side, dx=dx) for mark, y in marks),
        ]
    table = np.array(heights)  # (axes, runs)
    lines = [
        tag(
            "path",
            css="line thin",
            stroke=colour[group],
            vector_effect="non-scaling-stroke",
            d=_path(places, table[:, run]),
        )
        for run, group in enumerate(groups)
    ]
    stretched = tag(
        "svg", *lines, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=_CHART_HEIGHT
    )
    legend = [tag("span", tag("i", style=f"background:{colour[name]}"), name) for name in names]
    return _figure(
        title,
        detail,
        tag("p", *legend, css="legend"),
        tag(
            "div",
            _svg(f"{title}: {', '.join(axes)}", _CHART_HEIGHT, [stretched, *drawing]),
            css="chart parallel",
        ),
    )


def _on_axis(values: Sequence[float | str | None]) -> tuple[NDArray[np.float64], list[tuple[str, float]]]:
    """How far down each value lies, as a share of the axis, NaN for None; and the marks at the axis."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) for value in known):
        x = np.array([np.nan if value is None else float(value) for value in values])
        low, high = (float(np.nanmin(x)), float(np.nanmax(x))) if known else (0.0, 0.0)
        span = high - low or 1.0
        marks = [(f"{high:.4g}", 0.0), (f"{low:.4g}", 1.0)] if high > low else [(f"{high:.4g}", 0.5)]
        return (high - x) / span if high > low else np.where(np.isnan(x), np.nan, 0.5), marks
    texts = list(dict.fromkeys(str(value) for value in known))
    place = {text: (index + 0.5) / len(texts) for index, text in enumerate(texts)}
    y = np.array([np.nan if value is None else place[str(value)] for value in values])
    return y, list(place.items())


@dataclass(frozen=True)
class Axis:
    """One direction of a :func:`scatter_chart`. Better is always up or to the right."""

    label: str
    values: ArrayLike
    better: Literal["higher", "lower"] = "higher"


def scatter_chart(
    title: str, names: Sequence[str], x: Axis, y: Axis, *, marked: Collection[str] = ()
) -> Html:
    """A point for each name; a small number beside the points stands for the name in the legend.

    Args:
        title: what is set against what.
        names: of the points.
        x: across; it has a value for each name.
        y: up.
        marked: names whose points are filled.
    """
    (x_at, x_ticks), (y_at, y_ticks) = _placed(x), _placed(y)
    drawing = [_text(0.5, _CHART_HEIGHT + 40, f"{x.label} →", anchor="middle")]
    for tick, at in y_ticks:
        height = round(_CHART_HEIGHT * (1 - at), 1)
        drawing += [
            tag("line", css="axis", x1="0", x2="100%", y1=height, y2=height),
            _text(0, height + 4, tick, anchor="end", dx=-8),
        ]
    drawing += [_text(at, _CHART_HEIGHT + 20, tick, anchor="middle") for tick, at in x_ticks]
    for number_, (name, across, up) in enumerate(zip(names, x_at, y_at, strict=True), start=1):
        height = round(_CHART_HEIGHT * (1 - up), 1)
        css = "point marked" if name in marked else "point"
        drawing += [
            tag("circle", css=css, cx=_pc(across), cy=height, r=5),
            _text(across, height - 9, str(number_), anchor="middle", css="ink"),
        ]
    legend = [tag("span", tag("strong", f"{number_} "), name) for number_, name in enumerate(names, start=1)]
    return _figure(
        title,
        f"↑ {y.label}",
        tag("p", *legend, css="legend"),
        tag("div", _svg(f"{title}: {', '.join(names)}", _CHART_HEIGHT, drawing), css="chart plain"),
    )


def _placed(axis: Axis) -> tuple[list[float], list[tuple[str, float]]]:
    """Where values and ticks lie, as shares of the axis from its worse to its better end."""
    values = np.asarray(axis.values, np.float64)
    ticks = _ticks(values.min(), values.max())
    start, end = (ticks[0], ticks[-1]) if axis.better == "higher" else (ticks[-1], ticks[0])
    labels = [(_tick_label(tick, ticks), (tick - start) / (end - start)) for tick in ticks]
    return ((values - start) / (end - start)).tolist(), labels


class _Line(NamedTuple):
    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def _measured(series: Series, title: str) -> _Line:
    parts = (series.x, series.y, *(series.ci95 or (series.y, series.y)))
    line = _Line(series.name, *(np.asarray(part, np.float64) for part in parts))
    if len({part.shape for part in line[1:]}) > 1 or line.x.ndim != 1 or not np.isfinite(line.y).any():
        raise ValueError(
            f"line {series.name!r} of chart {title!r} has {line.x.size} x, {line.y.size} y, "
            f"{int(np.isfinite(line.y).sum())} of them finite: give one y for each x, "
            "at least one of them finite"
        )
    return line


def heading(title: str, intro: str = "") -> Html:
    """What stands over a few pieces within a section."""
    return join(tag("h3", title), tag("p", intro))


def columns(*parts: Html) -> Html:
    """Pieces side by side where there is room."""
    return tag("div", *parts, css="columns")


# --- pictures --------------------------------------------------------------------------------------------


def figure_grid(
    pictures: Mapping[str, Pictures | Sequence[Pictures]],
    captions: Sequence[str],
    *,
    scores: Mapping[str, ArrayLike] | None = None,
    digits: int = 2,
    remarks: Sequence[str] | None = None,
    num_columns: int | None = None,
) -> Html:
    """The same prompts drawn by several models, side by side, enlarged without smoothing.

    Pictures above 128 pixels a side become JPEG on the page, and are reduced to 256 pixels.

    Args:
        pictures: for each model, from left to right, its (N, H, W, 3) uint8 pictures; or N pictures
            (H, W, 3) of any sizes.
        captions: the N prompts.
        scores: for each model its N scores, printed under the pictures; a prompt's best is bold.
        digits: of the scores, behind the point.
        remarks: N of them, small beneath the captions.
        num_columns: models beside each other before a new row begins; all of them where left out.
    """
    num = len(captions)
    for name, images in pictures.items():
        shapes = {(str(image.dtype), image.shape[2:]) for image in images}
        if len(images) != num or shapes - {("uint8", (3,))}:
            raise ValueError(
                f"pictures of {name!r} are {len(images)} of {images[0].dtype} {images[0].shape}: "
                f"give ({num}, H, W, 3) uint8, one for each caption"
            )
    marks = {name: np.asarray(values, np.float64) for name, values in (scores or {}).items()}
    side = max(image.shape[1] for images in pictures.values() for image in images)
    # Whole multiples keep every pixel the same size.
    shown = min(_MAX_SIDE, side * max(1, round(_SHOWN_SIDE / side)))
    style = f"--count:{num_columns or len(pictures)};--side:{shown}px"

    def cell(name: str, i: int) -> Html:
        picture = tag("img", alt=f"{name}: {captions[i]}", src=_data_url(pictures[name][i]))
        if name not in marks:
            return tag("div", picture, tag("span", name))
        is_best = marks[name][i] == max(mark[i] for mark in marks.values())
        mark = tag("b" if is_best else "i", f"{marks[name][i]:.{digits}f}")
        return tag("div", picture, tag("span", name, " ", mark))

    rows = (
        tag(
            "figure",
            tag("div", *(cell(name, i) for name in pictures)),
            tag("figcaption", captions[i], *([tag("small", " ", remarks[i])] if remarks else [])),
            css="pictures",
            style=style,
        )
        for i in range(num)
    )
    return tag("div", *rows, css="grid")


def _data_url(picture: Pictures) -> str:
    image, file = Image.fromarray(picture), io.BytesIO()
    kind = "png" if max(image.size) <= _LOSSLESS_SIDE else "jpeg"
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    image.save(file, kind, quality=92, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# --- tables ----------------------------------------------------------------------------------------------


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str | float]],
    *,
    caption: str = "",
    right: Collection[int] = (),
) -> Html:
    """A plain table. Numbers stand right; a figure that could not be computed is a text with its reason.

    Args:
        heads: of the columns.
        rows: of cells, one for each head.
        caption: over the table.
        right: columns of figures given as texts, such as percentages, to stand right as well.
    """
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row of the table has {len(row)} cells, its head {len(heads)}: give as many")
    texts = [i not in right and any(isinstance(row[i], str) for row in rows) for i in range(len(heads))]
    styles = ["" if is_text else "number" for is_text in texts]
    body = (
        tag("tr", *(tag("td", _cell(cell), css=css) for cell, css in zip(row, styles, strict=True)))
        for row in rows
    )
    return _table(
        caption,
        [tag("th", head, css=css) for head, css in zip(heads, styles, strict=True)],
        tag("tbody", *body),
    )


def slice_table(
    slices: Mapping[str, Mapping[str, WinRate]],
    overall: WinRate,
    *,
    caption: str = "",
    figure: Literal["win", "win_minus_lose"] = "win",
    q_values: Mapping[str, Mapping[str, float]] | None = None,
) -> Html:
    """Win rates within slices as a forest plot, against the overall figure (dashed).

    Args:
        slices: group (subject, colour, ...) -> slice (ball, red, ...) -> its win rate.
        overall: the win rate of all prompts.
        caption: what is compared; say that slices are exploratory.
        figure: the share of wins, or wins minus losses.
        q_values: of each slice, by group and name.
    """
    groups = {**slices, "": {"all": overall}}
    if figure == "win":
        low, high = 0.0, 1.0
    else:
        widest = max(
            abs(end)
            for rates in groups.values()
            for rate in rates.values()
            for end in rate.win_minus_lose_ci95
        )
        high = min(1.0, math.ceil(10 * widest) / 10)
        low = -high

    def value(rate: WinRate) -> float:
        return rate.win if figure == "win" else rate.win_minus_lose

    def at(share: float) -> float:
        return (share - low) / (high - low)

    def row(name: str, rate: WinRate, q: float | None) -> Html:
        if figure == "win":
            ci95, shown = rate.ci95, (percent(rate.win), percent_interval(rate.ci95))
        else:
            ci95 = rate.win_minus_lose_ci95
            shown = (points(rate.win_minus_lose), points_interval(ci95))
        drawing = [
            _vertical(0.5, 0, 30, "axis"),
            _vertical(at(value(overall)), 0, 30, "mark"),
            *_whisker((at(ci95[0]), at(ci95[1])), 15, cap=0),
            _dot(at(value(rate)), 15),
        ]
        return tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", f"{rate.num_prompts:,}", css="number wide"),
            *(tag("td", text, css="number") for text in shown),
            *(tag("td", percent(share), css="number wide") for share in (rate.tie, rate.lose)),
            *([tag("td", "" if q is None else p_value(q), css="number")] if q_values else []),
            tag("td", _svg(f"{name}: {shown[0]}, {shown[1]}", 30, drawing), css="forest"),
            css="all" if rate is overall else "",
        )

    ends = [percent(x, 0) if figure == "win" else points(x, 0) for x in (low, (low + high) / 2, high)]
    heads = [
        tag("th"),
        tag("th", "prompts", css="number wide"),
        tag("th", "win" if figure == "win" else "win − lose", css="number"),
        tag("th", "95\u00a0% interval", css="number"),
        tag("th", "tie", css="number wide"),
        tag("th", "lose", css="number wide"),
        *([tag("th", "q", css="number")] if q_values else []),
        tag("th", tag("div", *(tag("span", end) for end in ends)), css="forest"),
    ]
    bodies = (
        tag(
            "tbody",
            *([tag("tr", tag("th", group, colspan=len(heads)))] if group else []),
            *(row(name, rate, (q_values or {}).get(group, {}).get(name)) for name, rate in rates.items()),
            css="group",
        )
        for group, rates in groups.items()
    )
    return _table(caption, heads, *bodies)


def outcome_table(
    groups: Mapping[str, Mapping[str, WinRate]], names: tuple[str, str], *, caption: str = ""
) -> Html:
    """Win, tie and lose of all prompts in percent, each row adding to 100, as the paper's tables have them.

    Args:
        groups: question -> prompt set -> the win rate of the second of ``names``.
        names: the two models, base first.
        caption: what is compared.
    """
    base, tuned = names

    def row(name: str, rate: WinRate) -> Html:
        stretches = (("win", 0.0, rate.win), ("tie", rate.win, rate.tie), ("lose", 1 - rate.lose, rate.lose))
        drawing = [
            tag("rect", css=outcome, x=_pc(start), y=4, width=_pc(share), height=14)
            for outcome, start, share in stretches
        ]
        words = f"{name}: {percent(rate.win)} win, {percent(rate.tie)} tie, {percent(rate.lose)} lose"
        win, lose = number(100 * rate.win, 1), number(100 * rate.lose, 1)
        difference = tag("small", points_interval(rate.win_minus_lose_ci95), css="under")
        return tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", f"{rate.num_prompts:,}", css="number wide"),
            tag("td", win, tag("small", percent_interval(rate.ci95), css="under wide"), css="number"),
            tag("td", number(100 - float(win) - float(lose), 1), css="number"),  # adds to 100 when rounded
            tag("td", lose, css="number"),
            tag("td", points(rate.win_minus_lose), difference, css="number"),
            tag("td", _svg(words, 22, drawing), css="forest wide"),
            css="outcome",
        )

    heads = [
        tag("th"),
        tag("th", "prompts", css="number wide"),
        tag("th", tag("i", css="win"), f"{tuned} wins", css="number key"),
        tag("th", tag("i", css="tie"), "tie", css="number key"),
        tag("th", tag("i", css="lose"), f"{base} wins", css="number key"),
        tag("th", "win − lose", css="number"),
        tag("th", css="forest wide"),
    ]
    bodies = (
        tag(
            "tbody",
            tag("tr", tag("th", group, colspan=len(heads))),
            *(row(name, rate) for name, rate in rates.items()),
            css="group",
        )
        for group, rates in groups.items()
    )
    return _table(caption, heads, *bodies)


def settings(values: Mapping[str, Any]) -> Html:
    """Every setting, folded by its first key; nested keys are joined by dots."""
    folds: dict[str, list[tuple[str, str]]] = {}
    for key, value in values.items():
        folds.setdefault(key if isinstance(value, Mapping) else "general", []).extend(_flat(key, value))

    def row(key: str, value: str) -> Html:
        breakable = Html(escape(key).replace(".", ".<wbr>"))
        return tag("tr", tag("th", breakable, scope="row"), tag("td", value))

    return join(
        *(
            tag(
                "details",
                tag("summary", f"{name} ", tag("small", str(len(rows)))),
                tag("table", *(row(key, value) for key, value in rows)),
            )
            for name, rows in folds.items()
        )
    )


def provenance(command: str, facts: Mapping[str, str]) -> Html:
    """What made these figures: the command, and machine, date, versions, seconds, peak memory by name."""
    rows = (join(tag("dt", name), tag("dd", value)) for name, value in facts.items())
    return join(tag("pre", command), tag("dl", *rows, css="facts"))


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _cell(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}".replace("-", "−")


def _table(caption: str, heads: Sequence[Html], *bodies: Html) -> Html:
    title = [tag("caption", caption, css="title")] if caption else []
    return tag("div", tag("table", *title, tag("thead", tag("tr", *heads)), *bodies), css="scroll")


# --- the page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, a sentence or two, pieces."""

    title: str
    body: Sequence[Html]
    intro: str = ""


def page(
    title: str,
    sentence: str,
    sections: Sequence[Section],
    *,
    remark: str = "",
    footer: str = "Intervals are 95\u00a0%.",
) -> Html:
    """The whole document.

    Args:
        title: what was done, in a few words.
        sentence: the result; see :func:`headline`.
        sections: from the most to the least important.
        remark: under the sentence: who judged, and what the figures are not.
        footer: what holds for all figures.
    """
    style = files("emu_lightning.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    header = tag(
        "header", tag("h1", title), tag("p", sentence, css="headline"), tag("p", remark, css="muted")
    )
    links = tag("nav", *(tag("a", one.title, href=f"#{_slug(one.title)}") for one in sections))
    bodies = (
        tag("section", tag("h2", one.title), tag("p", one.intro), *one.body, id=_slug(one.title))
        for one in sections
    )
    end = tag("footer", f"The figures are also in results.json beside this page. {footer}".rstrip())
    return Html(f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{tag("main", header, links, *bodies, end)}
</body>
</html>
""")


def write_report(folder: str | Path, results: Mapping[str, Any], document: Html) -> Path:
    """Writes ``report.html`` and ``results.json``; a reader never meets half a file.

    Args:
        folder: made where it is missing.
        results: nested figures, fractions from 0 to 1. A figure that could not be computed is left out or
            given as a text with the reason; NaN is refused.
        document: see :func:`page`.

    Returns:
        Path of ``report.html``.
    """
    folder = Path(folder)
    text = json.dumps(_plain(results, ""), indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "results.json", text)
    write_whole(folder / "report.html", document)
    return folder / "report.html"


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), key)
    if isinstance(value, list | tuple):
        return [_plain(inner, key) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"result {key!r} is {value}: leave it out, or give the reason as a text")
    return str(value) if isinstance(value, Path) else value


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _figure(title: str, detail: str, *parts: Html) -> Html:
    caption = tag("figcaption", tag("span", title, css="title"), " ", tag("small", detail))
    return tag("figure", caption, *parts)


# --- drawing: x is a share of the width, y is in pixels --------------------------------------------------


def _pc(share: float) -> str:
    return f"{100 * share:.2f}%"


def _anchor(x: float) -> str:
    return "start" if x < 0.08 else "end" if x > 0.92 else "middle"


def _svg(label: str, height: float, drawing: Sequence[Html]) -> Html:
    return tag("svg", *drawing, role="img", aria_label=label, height=height)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", css: str = "", dx: float = 0, style: str = ""
) -> Html:
    return tag("text", text, css=css, x=_pc(x), y=f"{y:.4g}", dx=dx, text_anchor=anchor, style=style)


def _vertical(x: float, y1: float, y2: float, css: str) -> Html:
    return tag("line", css=css, x1=_pc(x), x2=_pc(x), y1=y1, y2=y2)


def _whisker(ends: Interval, y: float, cap: float = 6) -> list[Html]:
    low, high = (_pc(min(1.0, max(0.0, end))) for end in ends)
    lines = [(low, high, y, y), (low, low, y - cap, y + cap), (high, high, y - cap, y + cap)]
    return [
        tag("line", css=css, x1=x1, x2=x2, y1=y1, y2=y2)
        for css in ("halo", "whisker")
        for x1, x2, y1, y2 in lines
    ]


def _dot(x: float, y: float) -> Html:
    return tag("circle", css="dot", cx=_pc(x), cy=y, r=5)


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Through the finite points, with a gap where ``y`` is NaN, in a box of 1000 by 1000."""
    steps, move = [], "M"
    for a, b in zip(1000 * x, 1000 * y, strict=True):
        if np.isfinite(b):
            steps.append(f"{move}{a:.1f} {b:.1f}")
        move = "L" if np.isfinite(b) else "M"
    return "".join(steps)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low and high."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _tick_label(value: float, ticks: Sequence[float], unit: str = "") -> str:
    scale = 100 if unit == "%" else 1
    step = scale * (ticks[1] - ticks[0])
    digits = next((digits for digits in range(8) if abs(round(step, digits) / step - 1) < 1e-6), 8)
    return number(scale * value, digits) + ("\u00a0%" if unit and value == ticks[-1] else "")


def _apart(heights: Sequence[float], gap: float = 17) -> list[float]:
    """Moves labels down until no two are nearer than ``gap`` pixels, then those below the chart up again."""
    order = np.argsort(heights, kind="stable")
    moved = np.array(heights, np.float64)
    for above, below in zip(order, order[1:], strict=False):
        moved[below] = max(moved[below], moved[above] + gap)
    limit = float(_CHART_HEIGHT)
    for label in order[::-1]:
        moved[label] = min(moved[label], limit)
        limit = moved[label] - gap
    return [float(y) for y in moved]
