"""Davidson's model against his published example, an independent optimum and known parameters."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import optimize

from emu_lightning.evaluation import davidson
from emu_lightning.evaluation.davidson import RIDGE, Comparison, fit_davidson

# Example 2 of Davidson (1970): i, j, preferences for i, for j, neither; brands of chocolate pudding.
PUDDINGS = [
    (1, 2, 19, 22, 16), (1, 3, 16, 19, 12), (2, 3, 19, 19, 10), (1, 4, 18, 23, 13), (2, 4, 23, 19, 9),
    (3, 4, 19, 20, 15), (1, 5, 13, 19, 18), (2, 5, 16, 20, 12), (3, 5, 16, 15, 17), (4, 5, 17, 14, 16),
    (1, 6, 18, 21, 12), (2, 6, 22, 20, 12), (3, 6, 13, 18, 10), (4, 6, 14, 19, 18), (5, 6, 11, 21, 12),
]  # fmt: skip


def comparisons_of(table: list[tuple]) -> list[Comparison]:
    """Each comparison on a prompt of its own."""
    rows = [
        (str(i), str(j), label)
        for i, j, *counts in table
        for label, count in zip(("A", "B", "Tie"), counts, strict=True)
        for _ in range(count)
    ]
    return [Comparison(f"prompt {n}", *row) for n, row in enumerate(rows)]  # type: ignore[arg-type]


def test_the_published_example_is_reproduced() -> None:
    """Strengths adding to 1, and nu, as in the paper; the standard error of brand 6 against brand 1 as in the
    documentation of the R package PlackettLuce."""
    fit = fit_davidson(comparisons_of(PUDDINGS))
    worths = {name: math.exp(strength) for name, strength in fit.strengths.items()}
    published = {"1": 0.1388, "2": 0.1729, "3": 0.1617, "4": 0.1653, "5": 0.1586, "6": 0.2023}
    assert {name: worth / sum(worths.values()) for name, worth in worths.items()} == pytest.approx(
        published, abs=2e-4
    )
    assert fit.nu == pytest.approx(0.7468, abs=2e-4)
    value, (low, high) = fit.differences["6", "1"]
    assert value == pytest.approx(0.3771, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.1924, rel=0.05)


def test_the_fit_is_the_maximum_that_another_optimiser_finds() -> None:
    rng = np.random.default_rng(1)
    table = [(i, j, *rng.integers(1, 40, 3)) for i, j in [(0, 1), (1, 2), (2, 3), (0, 3)]]

    def loss(parameters: np.ndarray) -> float:
        pi, nu = np.exp(parameters[:4]), np.exp(parameters[4])
        total = RIDGE / 2 * (parameters**2).sum()
        for i, j, wins, losses, ties in table:
            chances = np.array([pi[i], pi[j], nu * np.sqrt(pi[i] * pi[j])])
            total -= np.array([wins, losses, ties]) @ np.log(chances / chances.sum())
        return total

    best = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-6}).x
    fit = fit_davidson(comparisons_of(table))
    assert [fit.strengths[str(i)] for i in range(4)] == pytest.approx(best[:4], abs=1e-4)
    assert math.log(fit.nu) == pytest.approx(best[4], abs=1e-4)
    assert sum(fit.strengths.values()) == pytest.approx(0, abs=1e-9)


def test_counts_in_exact_proportion_give_their_parameters() -> None:
    """Strengths 1, 4 and 16 and nu 1: wins, losses and ties stand as pi_i, pi_j and sqrt(pi_i * pi_j)."""
    fit = fit_davidson(
        comparisons_of([("c", "b", 400, 100, 200), ("b", "a", 400, 100, 200), ("c", "a", 640, 40, 160)])
    )
    assert list(fit.strengths) == ["c", "b", "a"]
    assert fit.differences["c", "b"].value == pytest.approx(math.log(4), abs=1e-3)
    assert fit.differences["c", "a"].value == pytest.approx(math.log(16), abs=1e-3)
    assert fit.nu == pytest.approx(1, abs=1e-3)
    assert fit.probabilities("c", "a") == pytest.approx((16 / 21, 4 / 21, 1 / 21), abs=1e-3)
    assert fit.told_apart == (("c", "b"), ("c", "a"), ("b", "a"))


def test_known_parameters_are_recovered_from_simulated_votes() -> None:
    rng = np.random.default_rng(0)
    strengths, nu = {"small": -0.6, "base": 0.1, "large": 0.5}, 0.6
    comparisons = []
    for prompt in range(1500):
        for a, b in (("small", "base"), ("base", "large"), ("large", "small")):
            half = (strengths[a] - strengths[b]) / 2
            weights = np.array([math.exp(half), math.exp(-half), nu])
            label = rng.choice(["A", "B", "Tie"], p=weights / weights.sum())
            comparisons.append(Comparison(f"{prompt}", a, b, label))
    fit = fit_davidson(comparisons)
    assert fit.strengths == pytest.approx(strengths, abs=0.06) and fit.nu == pytest.approx(nu, abs=0.06)
    for (stronger, weaker), (_, (low, high)) in fit.differences.items():
        assert low < strengths[stronger] - strengths[weaker] < high and high - low < 0.3
    assert (fit.num_comparisons, fit.num_prompts) == (4500, 1500)


@pytest.mark.parametrize("num,at_least,at_most", [(50, 2, 3), (5000, 6.5, 8)])
def test_a_clean_sweep_stays_finite_and_in_doubt(num: int, at_least: float, at_most: float) -> None:
    """The lower end is near the log odds of Wilson's, log(num / 1.96^2): 2.6 and 7.2."""
    fit = fit_davidson(comparisons_of([("x", "y", num, 0, 0)]))
    value, (low, high) = fit.differences["x", "y"]
    assert at_least < low < at_most < value < 15 and high >= value
    win, tie, _ = fit.probabilities(
        "x", "y"
    )  # the gradient is zero: what the wins still pull, the ridge holds
    assert num * (1 - win - tie / 2) == pytest.approx(RIDGE * fit.strengths["x"], rel=1e-3)


@pytest.mark.parametrize("table", [[("x", "y", 1, 0, 0)], [("x", "y", 0, 0, 300)]])
def test_one_win_or_ties_alone_tell_nothing_apart(table: list) -> None:
    fit = fit_davidson(comparisons_of(table))
    assert fit.told_apart == () and all(low < 0 < high for _, (low, high) in fit.differences.values())


def test_repeated_votes_on_a_prompt_do_not_narrow_the_intervals(monkeypatch) -> None:
    monkeypatch.setattr(davidson, "RIDGE", 1e-6)
    once = comparisons_of([("x", "y", 40, 30, 20), ("y", "z", 40, 30, 20)])
    single, copied = fit_davidson(once), fit_davidson(once * 5)
    assert copied.num_prompts == single.num_prompts == 180
    for pair, (value, ci95) in single.differences.items():
        assert copied.differences[pair].value == pytest.approx(value, abs=1e-4)
        assert copied.differences[pair].ci95 == pytest.approx(ci95, abs=1e-3)


def test_the_sides_of_a_comparison_do_not_matter() -> None:
    rows = comparisons_of([("x", "y", 9, 3, 4), ("z", "y", 2, 7, 5)])
    flipped = [Comparison(p, b, a, {"A": "B", "B": "A"}.get(label, "Tie")) for p, a, b, label in rows]  # type: ignore[arg-type]
    assert fit_davidson(flipped) == fit_davidson(rows)


def test_models_that_nothing_links_are_named() -> None:
    with pytest.raises(ValueError, match=r"no comparison links \(a, b\) with \(c, d, e\)"):
        fit_davidson(comparisons_of([("a", "b", 1, 1, 1), ("c", "d", 1, 1, 1), ("e", "d", 1, 0, 0)]))


@pytest.mark.parametrize(
    "rows,match",
    [
        ([], "there is no comparison"),
        ([Comparison("p", "x", "x", "A")], "'x' with itself"),
        ([Comparison("p", "x", "y", "Both")], "label 'Both'"),  # type: ignore[arg-type]
    ],
)
def test_comparisons_that_make_no_sense_are_refused(rows: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit_davidson(rows)


def test_the_result_is_plain_json() -> None:
    result = fit_davidson(comparisons_of([("x", "y", 30, 3, 4), ("z", "y", 25, 20, 5)])).to_dict()
    assert json.loads(json.dumps(result)) == result
    assert list(result["log_strengths"]) == ["x", "z", "y"] and result["told_apart"] == [
        ["x", "z"],
        ["x", "y"],
    ]
