"""Where tuning should stop: appeal, faithfulness, diversity and loss against the iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from emu_lightning.dashboard.ablations import Estimate
from emu_lightning.dashboard.runs import Curve, RunRecord
from emu_lightning.evaluation.stopping import MAX_FAITHFULNESS_LOSS, REASON, choose_stop

MEASURES = {  # as HeldOutEvaluation names them -> for people
    "appeal_win_minus_lose": "appeal, win minus lose",
    "faithfulness_win_minus_lose": "faithfulness, win minus lose",
    "diversity": "different pictures of a prompt",
}
LOSSES = {"train/loss": "training loss", "val/loss": "validation loss"}
SHARES = ("appeal_win_minus_lose", "faithfulness_win_minus_lose")  # of prompts


class Drift(NamedTuple):
    """What the paper saw when tuning went on (section 3.3): a measure falls, or (sign 1) rises."""

    statement: str
    measure: str
    sign: int = -1


DRIFTS = (
    Drift("the training loss still falls", "train/loss"),
    Drift("the validation loss rises", "val/loss", 1),
    Drift("faithfulness is lost", "faithfulness_win_minus_lose"),
    Drift("diversity is lost", "diversity"),
    Drift("appeal is lost", "appeal_win_minus_lose"),
)


@dataclass(frozen=True)
class StopTable:
    """What several tunings, replicates of one another, were at each stop.

    Args:
        steps: (N,) ascending; 0 is the start.
        estimates: by measure or loss, an estimate for each step; None where it was not measured.
        stop: the step that was chosen, or that the rule chooses for the mean of the runs; None where every
            step lost too much faithfulness.
        reason: why that one.
        since: the step that the last one is compared with: the stop; where that is the last one itself, the
            first at which all was measured.
        drifts: statement -> by how much, from ``since`` to the last step, paired by run.
        runs: names.
    """

    steps: Sequence[int]
    estimates: Mapping[str, Sequence[Estimate | None]]
    stop: int | None
    reason: str
    since: int
    drifts: Mapping[str, Estimate]
    runs: Sequence[str]


def read_stops(runs: Sequence[RunRecord]) -> StopTable | None:
    """The table of those runs that were judged at several steps; None where none was."""
    tables = {run.name: table for run in runs if len(table := _judged(run)) > 1}
    if not tables:
        return None
    common = sorted(set.intersection(*(set(table) for table in tables.values())))
    names = [
        name for name in (*MEASURES, *LOSSES) if any(name in table[common[-1]] for table in tables.values())
    ]
    estimates = {
        name: [_estimate([table[step].get(name) for table in tables.values()]) for step in common]
        for name in names
    }
    means: list[dict[str, Any]] = [
        {
            "step": step,
            **{name: of.mean for name in MEASURES if name in estimates and (of := estimates[name][i])},
        }
        for i, step in enumerate(common)
        if step > 0
    ]
    best = choose_stop(means)
    stop = None if best is None else int(best["step"])
    last = common[-1]
    complete = [step for step in common if all(set(names) <= set(table[step]) for table in tables.values())]
    since = stop if stop is not None and stop < last else next(iter(complete), last)
    drifts = {}
    for statement, name, sign in DRIFTS if since < last else ():
        pairs = [(table[since].get(name), table[last].get(name)) for table in tables.values()]
        changes = [sign * (end - begin) for begin, end in pairs if begin is not None and end is not None]
        if changes:
            drifts[statement] = Estimate.of(changes)
    reason = (
        REASON.format(-MAX_FAITHFULNESS_LOSS) if best else "every stop lost more faithfulness than allowed"
    )
    return StopTable(common, estimates, stop, reason, since, drifts, list(tables))


def _judged(run: RunRecord) -> dict[int, dict[str, float]]:
    """Step -> measures and losses."""
    table: dict[int, dict[str, float]] = {}
    steps = [int(stop["step"]) for stop in run.stops]
    for previous, stop in zip([0, *steps], run.stops, strict=False):
        step = int(stop["step"])
        measures = {name: float(stop[name]) for name in MEASURES if name in stop}
        if step == 0:  # the start against itself
            measures |= {"appeal_win_minus_lose": 0.0, "faithfulness_win_minus_lose": 0.0}
        losses = {name: run.curves[name] for name in LOSSES if name in run.curves}
        means = {name: _mean(curve, previous, step) for name, curve in losses.items()}
        table[step] = measures | {name: mean for name, mean in means.items() if mean is not None}
    return table


def _mean(curve: Curve, after: int, until: int) -> float | None:
    """Of what was logged between two steps: single batches differ too much to be compared."""
    inside = curve.values[(curve.steps > after) & (curve.steps <= until)]
    return float(np.mean(inside)) if len(inside) else None


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return Estimate.of(known) if known else None
