"""The page on which a person reads what automatic metrics say of several folders of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

from emu_lightning.evaluation import report
from emu_lightning.evaluation.metrics import CheckpointPoint, Measured, check_comparable, checkpoints_on_front
from emu_lightning.evaluation.report import Axis, Html, Section, join, number, tag

INTRO = (
    "Numbers of networks, not of people: a score that tuning or the choice of pictures has used says "
    "nothing more. An arrow shows which way is better; a range is the 95\u00a0% interval of a mean over "
    "prompts."
)
FRONT_INTRO = (
    "Do the pictures show their prompts (consistency), do they differ (diversity), do they look real "
    "(realism)? Tuning pays for one with another. Filled points are beaten by no other on all three. Up "
    "and right is better."
)
ARROWS = {"higher": "↑", "lower": "↓"}


def metrics_page(
    title: str,
    measured: Mapping[str, Sequence[Measured]],
    axes: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    command: str,
    facts: Mapping[str, str],
) -> Html:
    """One table of all metrics, the plot where there are axes, what is missing, networks, provenance.

    Args:
        title: of the page.
        measured: folder -> its metrics, the same ones in the same order.
        axes: consistency, diversity and realism, each by its metric's name; empty for no plot.
        settings: everything that was set; folded.
        command: what made this page.
        facts: name and value of what else made it.
    """
    sections = [Section("Metrics", [_table(measured), *_missing(measured), *_warnings(measured)], INTRO)]
    if axes:
        sections.append(Section("Consistency, diversity, realism", _front(measured, axes), FRONT_INTRO))
    sections += [
        Section("Networks", [_networks(measured)]),
        Section("Settings", [report.settings(settings)]),
        Section("How to repeat this", [report.provenance(command, facts)]),
    ]
    num = sum(one.value is not None for one in next(iter(measured.values())))
    sentence = f"{num} metrics of {len(measured)} folders of pictures: {', '.join(measured)}."
    return report.page(title, sentence, sections, remark="No person has judged.")


def points_of(
    measured: Mapping[str, Sequence[Measured]], axes: Mapping[str, str]
) -> dict[str, CheckpointPoint]:
    """The three metrics of each folder.

    Args:
        measured: folder -> its metrics.
        axes: consistency, diversity and realism, each by its metric's name.

    Raises:
        ValueError: an axis is missing, or is none of the metrics.
    """
    wanted = [field.name for field in fields(CheckpointPoint)]
    if missing := [axis for axis in wanted if axis not in axes]:
        raise ValueError(f"the plot needs {', '.join(wanted)}: name a metric for {' and for '.join(missing)}")
    points = {}
    for folder, metrics in measured.items():
        named = {one.name: one for one in metrics}
        if strange := [name for name in axes.values() if name not in named]:
            raise ValueError(f"{strange[0]!r} is none of the metrics: {', '.join(named)}")
        points[folder] = CheckpointPoint(**{axis: named[axes[axis]] for axis in wanted})
    return points


def _table(measured: Mapping[str, Sequence[Measured]]) -> Html:
    columns = list(measured.values())
    rows = [
        [
            f"{ones[0].name} {ARROWS[ones[0].better]}",
            _count(ones),
            *(_value(one) for one in ones),
        ]
        for ones in zip(*columns, strict=True)
    ]
    return report.table(["", "pictures", *measured], rows, right=range(1, 2 + len(measured)))


def _count(ones: Sequence[Measured]) -> str:
    nums = sorted({one.num for one in ones})
    against = {one.num_reference for one in ones if one.num_reference is not None}
    counted = f"{nums[0]:,}" if len(nums) == 1 else f"{nums[0]:,} to {nums[-1]:,}"
    return counted + "".join(f" against {each:,}" for each in sorted(against))


def _value(one: Measured) -> Html:
    if one.value is None:
        return join("missing")
    interval = "" if one.ci95 is None else f"{_figure(one.ci95[0])} to {_figure(one.ci95[1])}"
    return join(_figure(one.value), tag("small", interval, css="under") if interval else "")


def _figure(value: float) -> str:
    """Four significant digits."""
    digits = next((d for d in range(4) if abs(value) >= 10 ** (3 - d)), 4)
    return number(value, digits)


def _missing(measured: Mapping[str, Sequence[Measured]]) -> list[Html]:
    of: dict[tuple[str, str], list[str]] = {}
    for folder, ones in measured.items():
        for one in ones:
            if one.reason:
                of.setdefault((one.name, one.reason), []).append(folder)
    lines = []
    for (name, reason), folders in of.items():
        where = "" if len(folders) == len(measured) else f", {', '.join(folders)}"
        lines.append(f"{name}{where}: {reason}")
    return _list("What is missing, and why", lines)


def _warnings(measured: Mapping[str, Sequence[Measured]]) -> list[Html]:
    found = []
    for ones in zip(*measured.values(), strict=True):
        if all(one.value is not None for one in ones):
            try:
                check_comparable(*ones)
            except ValueError as error:
                found.append(str(error))
    return _list("Not to be compared", found)


def _list(title: str, lines: Sequence[str]) -> list[Html]:
    return [report.heading(title), tag("ul", *(tag("li", line) for line in lines))] if lines else []


def _front(measured: Mapping[str, Sequence[Measured]], axes: Mapping[str, str]) -> list[Html]:
    points = points_of(measured, axes)
    try:
        on_front = [name for name, is_on in checkpoints_on_front(points).items() if is_on]
    except ValueError as error:
        return [tag("p", f"No plot: {error}.")]
    drawn = {}
    for axis in ("diversity", "consistency", "realism"):
        ones = [getattr(point, axis) for point in points.values()]
        label = f"{axis} ({ones[0].name})"
        drawn[axis] = Axis(label, [one.value for one in ones], ones[0].better)
    charts = [
        report.scatter_chart(
            f"{b.capitalize()} against {a}", list(points), drawn[a], drawn[b], marked=on_front
        )
        for a, b in combinations(drawn, 2)
    ]
    return [report.columns(*charts)]


def _networks(measured: Mapping[str, Sequence[Measured]]) -> Html:
    networks = dict.fromkeys(net for ones in measured.values() for one in ones for net in one.networks)
    rows = [[net.name, net.weights_sha256[:16], net.preprocess_id] for net in networks]
    return report.table(["network", "weights, sha256", "preprocessing"], rows)
