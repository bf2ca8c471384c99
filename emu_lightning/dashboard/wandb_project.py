"""The runs of a W&B project, read as those of folders are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from emu_lightning.dashboard.runs import Curve, RunRecord, State, flatten

SECONDS, RETRIES = 20, 2  # for an answer of the server, and how often it is asked again
SECONDS_FOR_A_FILE = 120  # older history comes as files
# What W&B calls crashed, killed or preempted may go on; `emu sweep` calls that stopped.
STATES: Mapping[str, State] = {
    "pending": "waiting",
    "running": "running",
    "finished": "finished",
    "failed": "failed",
}
STEP = "trainer/global_step"  # of Lightning's logger; W&B's own `_step` counts the rows
NOT_CURVES = frozenset({STEP, "epoch"})  # data never ends, so epochs say nothing
DRAWN = "held_out/pictures"


def read_project(path: str) -> list[RunRecord]:
    """The runs of ENTITY/PROJECT, or of ENTITY/PROJECT/SWEEP, that `emu_lightning.callbacks.WandbRun` logged.

    Pictures stay on the server, so ``pictures`` is None; `emu dashboard` shows them from run folders. Of the
    ``stops`` there are the values that were logged: no intervals, and not the start itself. ``seconds`` are
    W&B's ``_runtime``, up to the last row that was logged; without the network, of the last start alone.

    Raises:
        ValueError: no key, no answer, no such project, or no run in it.
    """
    entity, project, *sweep = _parts(path)
    api = connect()
    filters = {"sweep": sweep[0]} if sweep else None
    with one_line_errors(f"{path} of W&B cannot be read"):
        try:
            runs = list(api.runs(f"{entity}/{project}", filters=filters, lazy=False))
        except ValueError as error:  # that is how the client says it
            raise ValueError(
                f"W&B has no project {entity}/{project} for this key: check its name, and who may see it"
            ) from error
        if not runs:
            what = f"sweep {sweep[0]} has" if sweep else "it has"
            raise ValueError(f"W&B has {entity}/{project}, but {what} no runs: `wandb sync` uploads them")
        names = Counter(run.name for run in runs)
        return [_record(run, run.name if names[run.name] == 1 else f"{run.name} {run.id}") for run in runs]


def connect() -> Any:
    """W&B's client, which asks nobody for a key, and gives up where no answer comes.

    Raises:
        ValueError: there is no key, or no server that takes it.
    """
    import wandb

    with one_line_errors("W&B does not answer, or not to this key (WANDB_BASE_URL, WANDB_API_KEY)"):
        # The client itself sets no limit to reading history.
        wandb.setup(
            wandb.Settings(
                mode="online",  # whatever trainings are told
                silent=True,
                x_graphql_timeout_seconds=SECONDS,
                x_graphql_retry_max=RETRIES,
                x_file_transfer_timeout_seconds=SECONDS_FOR_A_FILE,
                x_file_transfer_retry_max=RETRIES,
            )
        )
        if not wandb.login(prompt=False, verify=False):
            raise ValueError("no key for W&B: run `wandb login`, or set WANDB_API_KEY")
        return wandb.Api(timeout=SECONDS)


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turns what W&B's client raises into a ValueError of one line."""
    from pydantic import ValidationError  # of a setting, such as an address
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError  # is no `Error`

    try:
        yield
    except (Error, WandbApiFailedError, ValidationError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{path!r} names no W&B project: write ENTITY/PROJECT, or ENTITY/PROJECT/SWEEP")
    return parts


def _record(run: Any, name: str) -> RunRecord:
    # Of a run that was begun again offline W&B counts the rows anew, so only the clock tells their order.
    rows = sorted(run.scan_history(), key=lambda row: float(row["_timestamp"]))
    return RunRecord(
        name,
        run.sweep_name or "",
        STATES.get(run.state, "stopped"),
        # A run that has not begun has only what its sweep sets.
        flatten(run.config.get("cli", run.config)),
        _curves(rows),
        _stops(rows),
        run.summary.get("_runtime"),
        folder=run.url,
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row has for curves; JSON knows no NaN, so W&B writes it as text."""
    return {
        name: float(value)
        for name, value in row.items()
        if not name.startswith("_")
        and name not in NOT_CURVES
        and (isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"))
    }


def _curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """By name; where a run was begun again, what it logged last at a step."""
    logged: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in _numbers(row).items() if STEP in row else ():
            logged.setdefault(name, {})[int(row[STEP]) + 1] = value
    return {
        name: Curve(np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in logged.items()
    }


def _stops(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was judged on the way: on held-out prompts, else on those that choose the stop."""
    judged: dict[str, dict[int, dict[str, Any]]] = {"held_out/": {}, "tune/": {}}
    drawn = None
    for row in rows:
        if STEP not in row:
            continue
        if DRAWN in row:
            drawn = int(row[STEP]) + 1
        for prefix, stops in judged.items():
            values = {
                name.removeprefix(prefix): v for name, v in _numbers(row).items() if name.startswith(prefix)
            }
            if values:
                # HeldOutEvaluation logs its last values a step late, but the pictures of all at their step.
                at = drawn if prefix == "held_out/" and drawn is not None else int(row[STEP]) + 1
                stops[at] = {"step": at, **values}
    held_out, tune = ([stops[step] for step in sorted(stops)] for stops in judged.values())
    return held_out if len(held_out) > 1 else tune
