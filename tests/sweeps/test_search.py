"""Random and Bayesian proposals: inside, new, the same again, and better than chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from emu_lightning.sweeps.definition import Sweep
from emu_lightning.sweeps.records import Run
from emu_lightning.sweeps.search import propose
from tests.sweeps.test_definition import sweep_of

SPACES = {
    "lr": {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-1},
    "exponent": {"distribution": "log_uniform", "min": -2.0, "max": 0.0},
    "width": {"min": 1, "max": 8},
    "share": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25},
    "kind": {"values": ["a", [0, 1], None]},
}


def searched(sweep: Sweep, num: int, loss=lambda parameters: 0.0) -> list[Run]:
    runs: list[Run] = []
    for _ in range(num):
        parameters = propose(sweep, runs)
        assert parameters is not None
        runs.append(Run(sweep.run_name(parameters), parameters, "finished", metric=loss(parameters)))
    return runs


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_proposals_are_inside_new_and_the_same_again(method: str, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, method=method, metric={"name": "loss"}, parameters=SPACES)
    runs = searched(sweep, 12, lambda parameters: parameters["width"])
    assert len({run.name for run in runs}) == 12
    for run in runs:
        found = run.parameters
        assert 1e-5 <= found["lr"] <= 1e-1 and found["lr"] == float(f"{found['lr']:.6g}")
        assert math.exp(-2) <= found["exponent"] <= 1
        assert found["width"] in range(1, 9) and isinstance(found["width"], int)
        assert found["share"] in (0, 0.25, 0.5, 0.75, 1)
        assert found["kind"] in SPACES["kind"]["values"]
    assert len({run.parameters["width"] for run in runs}) > 3
    assert propose(sweep, runs[:5]) == runs[5].parameters  # as after a kill
    under_way = [*runs[:11], Run(runs[11].name, runs[11].parameters, "running")]
    assert propose(sweep, under_way) is not None


def test_bayes_finds_what_is_better(tmp_path: Path) -> None:
    """Of a bowl in two dimensions, whose minimum is at (3, 1e-3)."""

    def loss(parameters: dict[str, float]) -> float:
        return (parameters["x"] - 3) ** 2 + (math.log10(parameters["lr"]) + 3) ** 2

    for maximize in (False, True):
        goal = {"name": "loss", "goal": "maximize" if maximize else "minimize"}
        parameters = {"x": {"min": -10.0, "max": 10.0}, "lr": SPACES["lr"]}
        sweep = sweep_of(tmp_path, method="bayes", metric=goal, parameters=parameters)
        sign = -1 if maximize else 1
        losses = [sign * run.metric for run in searched(sweep, 40, lambda found, s=sign: s * loss(found))]
        assert sum(losses[30:]) / 10 < sum(losses[:10]) / 10 / 2  # the first ten are by chance


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, method="random", parameters={"kind": {"values": ["a", "b", "c"]}})
    runs = searched(sweep, 3)
    assert {run.parameters["kind"] for run in runs} == {"a", "b", "c"}
    assert propose(sweep, runs) is None
