"""What a sweep leaves for others to read: `sweep.json`, `runs.csv`, and a table on the screen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_lightning.files import write_whole
from emu_lightning.sweeps.definition import Sweep
from emu_lightning.sweeps.records import Run

SUMMARY, TABLE = "sweep.json", "runs.csv"
# What may change when a sweep goes on.
_FREE = ("run_cap", "name", "description", "early_terminate")


def definition(sweep: Sweep) -> dict[str, Any]:
    """What makes a sweep this one: its settings, as JSON has them."""
    settings = {key: value for key, value in sweep.settings.items() if key not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def refuse_other_sweep(sweep: Sweep, out: Path) -> bool:
    """Whether ``out`` holds this sweep.

    Raises:
        ValueError: it holds another.
    """
    summary = out / SUMMARY
    if not summary.is_file():
        return False
    if json.loads(summary.read_text())["definition"] != definition(sweep):
        raise ValueError(f"{out} holds a sweep of another definition than {sweep.path}: name another --out")
    return True


def write_tables(sweep: Sweep, runs: Sequence[Run], out: Path, folders: Mapping[str, Path | None]) -> None:
    """Writes both files, each whole.

    Args:
        folders: run name -> what it writes into, where that is known.
    """
    rows = [_facts(run, folders[run.name]) for run in runs]
    summary = {
        "file": str(sweep.path),
        "method": sweep.method,
        "metric": {"name": sweep.metric, "goal": "maximize" if sweep.maximize else "minimize"}
        if sweep.metric
        else None,
        "runs": [
            {**row, "parameters": run.parameters, "last_lines": run.last_lines.splitlines()}
            for row, run in zip(rows, runs, strict=True)
        ],
        "definition": definition(sweep),
    }
    write_whole(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    text = io.StringIO()
    columns = ["name", "state", *sweep.parameters, "metric", "seconds", "starts", "exit_code", "folder"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writerow({name: sweep.metric if name == "metric" and sweep.metric else name for name in columns})
    for row, run in zip(rows, runs, strict=True):
        writer.writerow(row | run.parameters)
    write_whole(out / TABLE, text.getvalue())


def _facts(run: Run, folder: Path | None) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "metric": run.metric,
        "seconds": round(run.seconds, 1),
        "starts": run.starts,
        "exit_code": run.exit_code,
        "folder": None if folder is None else str(folder),
    }


def screen_table(sweep: Sweep, runs: Sequence[Run]) -> str:
    """A line for each run: name, state, metric, seconds."""
    head = ["run", "state", *([sweep.metric] if sweep.metric else []), "seconds"]
    rows = [head]
    for run in runs:
        metric = [] if not sweep.metric else ["" if run.metric is None else f"{run.metric:.4g}"]
        rows.append([run.name, run.state, *metric, f"{run.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
        for row in rows
    )
