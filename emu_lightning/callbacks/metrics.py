"""The metrics file of a run folder."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """One CSV per run: a row for each logging, a column `step` and one per metric, on disk at once.

    Lightning's `CSVLogger` deletes the file when a run is resumed. This one goes on with it, and drops rows
    from the first logged step on: those steps came after the last checkpoint, and run again.

    Args:
        path: the CSV file, such as `runs/autoencoder/metrics.csv`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder's config.yaml says more."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": 0 if step is None else step}
        row |= {name: float(value) for name, value in metrics.items() if name != "epoch"}  # data never ends
        added = [name for name in row if name not in self._columns]
        if added:
            rows = self._rows()
            if not self._columns:  # the first row of this process
                rows = [earlier for earlier in rows if int(earlier["step"]) < row["step"]]
            self._columns = list(dict.fromkeys([*self._columns, *(rows[0] if rows else ()), *added]))
            self._rewrite([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a kill may have torn the last row
        return list(csv.DictReader(whole.splitlines()))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
