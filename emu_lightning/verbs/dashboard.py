"""`emu dashboard`: one page from run folders, or from a W&B project."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from emu_lightning.dashboard.page import Dashboard
from emu_lightning.dashboard.runs import RunRecord, read_runs
from emu_lightning.evaluation.report import write_report
from emu_lightning.verbs.arguments import call

WANDB = "wandb:"


def dashboard(
    runs: list[str], out: str = "runs/dashboard", title: str = "Ablations", views: str | None = None
) -> None:
    """Puts runs side by side: the paper's ablations with intervals, stops, pictures, curves, settings.

    Args:
        runs: folders of `emu sweep`, of `emu fit`, or of several trainings; wandb:ENTITY/PROJECT, or
            wandb:ENTITY/PROJECT/SWEEP, for what a W&B server has.
        out: folder for report.html and results.json.
        title: of the page.
        views: ENTITY/PROJECT of W&B, which is given a workspace and a report with the same views.
    """
    begun = time.monotonic()
    records = _with_own_names([record for path in runs for record in _read(path)])
    command = " ".join(["emu dashboard", *runs, *(["--out", out] if out != "runs/dashboard" else [])])
    board = Dashboard(records)
    results = board.results(command)
    page = board.page(title, command, {"seconds": f"{time.monotonic() - begun:.1f}"})
    print(write_report(out, results, page))
    if views is not None:
        from emu_lightning.dashboard.workspace import save_views

        print("\n".join(save_views(views)))


def _read(path: str) -> list[RunRecord]:
    if path.startswith(WANDB):
        from emu_lightning.dashboard.wandb_project import read_project

        return read_project(path.removeprefix(WANDB))
    if not Path(path).is_dir():
        raise ValueError(f"{path} is no folder: name folders of runs, or {WANDB}ENTITY/PROJECT")
    return read_runs(path)


def _with_own_names(records: list[RunRecord]) -> list[RunRecord]:
    """Runs of several sweeps may have one name; then the sweep's stands before it."""
    names = Counter(record.name for record in records)
    return [
        replace(record, name=f"{record.sweep or Path(record.folder).parent}/{record.name}")
        if names[record.name] > 1
        else record
        for record in records
    ]


def main(argv: list[str]) -> None:
    given = [argument for argument in argv[: _first_option(argv)]]
    call(dashboard, [*(["--runs", repr(given)] if given else []), *argv[len(given) :]], "emu dashboard")


def _first_option(argv: list[str]) -> int:
    return next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
