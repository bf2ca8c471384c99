"""The runs that a page is about, as their folders hold them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from emu_lightning.evaluation.generation import MANIFEST, PictureFolder, open_folder

State = Literal["waiting", "running", "finished", "failed", "stopped"]
SWEEP = "sweep.json"  # of a folder of `emu sweep`
CONFIG, FINISHED, CURVES = "config.yaml", "finished.json", ("metrics.csv", "speed.csv")  # of one of `emu fit`


@dataclass(frozen=True)
class Curve:
    """A logged value: ``steps`` and ``values``, both (N,), steps from 1 as people count them."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class RunRecord:
    """One training, wherever it was read from.

    Args:
        name: what a person knows it by; no two of a page are the same.
        sweep: the sweep it belongs to; empty for a training by itself.
        state: how it ended, or that it has not.
        config: resolved settings by dotted names, without `class_path` and `init_args` between them.
        curves: logged values by name.
        stops: of a tuning that was judged on the way: step, means and comparison with the start, by step.
        seconds: that it ran; None where that is not known.
        pictures: of held-out prompts, after training; None where none were drawn.
        pictures_at: the same at each step that they were drawn at; 0 is the start of tuning.
        folder: where it was read.
    """

    name: str
    sweep: str
    state: State
    config: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    stops: Sequence[Mapping[str, Any]] = ()
    seconds: float | None = None
    pictures: PictureFolder | None = None
    pictures_at: Mapping[int, PictureFolder] = field(default_factory=dict)
    folder: str = ""

    @cached_property
    def last(self) -> dict[str, float]:
        """The last value of each curve."""
        return {name: float(curve.values[-1]) for name, curve in self.curves.items()}


def read_runs(path: str | Path) -> list[RunRecord]:
    """The runs in a folder: of `emu sweep`, of one training, or of several that lie in it.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if (path / SWEEP).is_file():
        return list(_of_sweep(path))
    if (path / CONFIG).is_file():
        return [read_run(path)]
    folders = sorted(each.parent for each in path.rglob(CONFIG) if "checkpoints" not in each.parts)
    if not folders:
        raise ValueError(f"{path} holds no run: name the folder of a training, of a sweep, or of several")
    return [read_run(folder, name=str(folder.relative_to(path))) for folder in folders]


def _of_sweep(path: Path) -> Iterator[RunRecord]:
    summary = json.loads((path / SWEEP).read_text())
    for run in summary["runs"]:
        folder = _found(run["folder"], path, run["name"])
        if folder is None:  # it has not begun, or its folder was removed
            state: State = run["state"] if run["state"] != "finished" else "stopped"
            yield RunRecord(run["name"], path.name, state, run["parameters"], folder=run["folder"] or "")
            continue
        yield read_run(
            folder, name=run["name"], sweep=path.name, state=run["state"], seconds=run["seconds"] or None
        )


def _found(folder: str | None, sweep: Path, name: str) -> Path | None:
    """Where a run of a sweep lies: as was noted, or, where all was moved, inside the sweep's folder."""
    for candidate in (Path(folder) if folder else None, sweep / name):
        if candidate is not None and (candidate / CONFIG).is_file():
            return candidate
    return None


def read_run(
    folder: str | Path,
    *,
    name: str | None = None,
    sweep: str = "",
    state: State | None = None,
    seconds: float | None = None,
) -> RunRecord:
    """The run in a folder of `emu fit`.

    Raises:
        ValueError: a file of it is damaged.
    """
    folder = Path(folder)
    try:
        return _run(folder, name, sweep, state, seconds)
    except (ValueError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} has a damaged file ({reason}): mend it, or leave the run out") from error


def _run(folder: Path, name: str | None, sweep: str, state: State | None, seconds: float | None) -> RunRecord:
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    curves = {key: curve for file in CURVES for key, curve in _curves(folder / file).items()}
    finished = json.loads((folder / FINISHED).read_text()) if (folder / FINISHED).is_file() else None
    return RunRecord(
        name or folder.name,
        sweep,
        state or ("stopped" if finished is None else "finished"),
        flatten(config),
        curves,
        _stops(folder),
        finished["seconds"] if seconds is None and finished else seconds,
        *_pictures(folder),
        str(folder),
    )


def _curves(file: Path) -> dict[str, Curve]:
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    curves = {}
    for name in rows[0] if rows else ():
        seen = [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        if name != "step" and seen:
            steps, values = zip(*seen, strict=True)
            curves[name] = Curve(np.array(steps), np.array(values))
    return curves


def _stops(folder: Path) -> list[dict[str, Any]]:
    """What was judged on the way: on held-out prompts, else on those that choose the stop."""
    held_out = folder / "held_out" / "results.json"
    if held_out.is_file():
        entries = json.loads(held_out.read_text())
        stops = sorted((entry for key, entry in entries.items() if key != "kept"), key=lambda e: e["step"])
        if sum(entry["step"] > 0 for entry in stops) > 1:
            return stops
    preference = folder / "preference.jsonl"
    return [json.loads(line) for line in preference.read_text().splitlines()] if preference.is_file() else []


def _pictures(folder: Path) -> tuple[PictureFolder | None, dict[int, PictureFolder]]:
    """Of held-out prompts: of the model that was kept, and of each step."""
    results = folder / "held_out" / "results.json"
    entries = json.loads(results.read_text()) if results.is_file() else {}
    drawn = {
        name: open_folder(results.parent / name)
        for name in entries
        if (results.parent / name / MANIFEST).is_file()
    }
    at = {int(entries[name]["step"]): pictures for name, pictures in drawn.items()}
    return drawn.get(entries.get("kept", "")), dict(sorted(at.items()))


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"init_args": {"x": 1}}} -> {"model.x": 1}; a class stands under what it is for."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and "class_path" in value:
            flat[key] = str(value["class_path"])
            value = value.get("init_args") or {}
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value).items()}
        else:
            flat[key] = value
    return flat
