"""The runs of a sweep, in SQLite: what was begun, how it ended, what came of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from emu_lightning.sweeps.definition import Parameters

State = Literal["waiting", "running", "finished", "failed", "stopped"]


@dataclass
class Run:
    """One set of parameters, and what became of it.

    Args:
        name: W&B's run id.
        parameters: dotted names and values.
        state: `stopped` was told to end, or killed; `failed` ended by itself with an error.
        starts: how often its program was started.
        seconds: that its program ran, over all starts.
        begun: when the last start was, in seconds since the epoch.
        exit_code: of the last start, where it ended.
        metric: last value of the sweep's metric; None where there is none.
        last_lines: of what it printed, where it failed.
    """

    name: str
    parameters: Parameters
    state: State = "waiting"
    starts: int = 0
    seconds: float = 0.0
    begun: float = 0.0
    exit_code: int | None = None
    metric: float | None = None
    last_lines: str = ""


_COLUMNS = [field.name for field in fields(Run)]


class Records:
    """The table of runs in a file, in the order in which they came; a change is on disk when it returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        with self._database:
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS runs ({', '.join(_COLUMNS)}, PRIMARY KEY (name))"
            )

    def all(self) -> list[Run]:
        rows = self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs ORDER BY rowid")
        runs = [Run(*row) for row in rows]
        return [replace(run, parameters=json.loads(str(run.parameters))) for run in runs]

    def add(self, runs: Iterable[Run]) -> None:
        """Those whose names are new."""
        marks = ", ".join("?" * len(_COLUMNS))
        with self._database:
            self._database.executemany(f"INSERT OR IGNORE INTO runs VALUES ({marks})", map(_row, runs))

    def save(self, run: Run) -> None:
        """All that is known of a run, in place of what was."""
        assigned = ", ".join(f"{name} = ?" for name in _COLUMNS)
        with self._database:
            self._database.execute(f"UPDATE runs SET {assigned} WHERE name = ?", (*_row(run), run.name))

    def close(self) -> None:
        self._database.close()


def _row(run: Run) -> Sequence[Any]:
    return astuple(replace(run, parameters=json.dumps(run.parameters)))  # type: ignore[arg-type]
