"""Sample sizes against known figures, the intervals they promise and simulated power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from emu_lightning.evaluation.planning import (
    majority_shares,
    prompts_for_sign_test,
    prompts_for_win_minus_lose,
    prompts_for_win_rate,
)
from emu_lightning.evaluation.votes import wilson_ci95, win_rate


@pytest.mark.parametrize("share,prompts", [(0.5, 1068), (0.7, 897), (0.829, 606)])
def test_three_points_of_win_rate_need_the_known_number_of_prompts(share: float, prompts: int) -> None:
    assert prompts_for_win_rate(0.03, share) == prompts


def test_known_sizes_of_the_other_plans() -> None:
    assert prompts_for_win_minus_lose(0.03, ties=0.2) == 3415
    assert prompts_for_sign_test(0.53) == pytest.approx(2180, abs=5)
    assert prompts_for_win_rate(0.0243) <= 1632 < prompts_for_win_rate(0.0242)  # PartiPrompts: 2.4 points
    assert prompts_for_win_rate(0.0214) <= 2100 < prompts_for_win_rate(0.0213)  # Open User Input: 2.1


@pytest.mark.parametrize("share", [0.01, 0.03, 0.2, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("half_width", [0.02, 0.05, 0.1])
def test_the_planned_prompts_and_no_fewer_keep_both_intervals_within_the_half_width(
    share: float, half_width: float
) -> None:
    def widest(num: int) -> float:
        low, high = wilson_ci95(share, num)
        return max((high - low) / 2, stats.norm.ppf(0.975) * np.sqrt(share * (1 - share) / num))

    num = prompts_for_win_rate(half_width, share)
    assert widest(num) <= half_width < widest(num - 1)


def test_the_planned_prompts_give_the_half_width_of_win_minus_lose() -> None:
    num = prompts_for_win_minus_lose(0.05, ties=0.2, win_minus_lose=0.3)
    wins, losses = round(0.55 * num), round(0.25 * num)
    low, high = win_rate(
        ["B"] * wins + ["A"] * losses + ["Tie"] * (num - wins - losses), of="B"
    ).win_minus_lose_ci95
    assert (high - low) / 2 == pytest.approx(0.05, abs=2e-4)


@pytest.mark.parametrize("wins,power", [(0.53, 0.8), (0.6, 0.9), (0.42, 0.8)])
def test_the_sign_test_has_the_power_it_was_planned_for(wins: float, power: float) -> None:
    num = prompts_for_sign_test(wins, power=power)
    outcomes = np.arange(num + 1)
    critical = stats.binom.ppf(0.025, num, 0.5) - 1  # the most losses with p up to 0.05
    if 2 * stats.binom.cdf(critical + 1, num, 0.5) <= 0.05:
        critical += 1
    found = (outcomes <= critical) | (outcomes >= num - critical)
    assert stats.binom.pmf(outcomes, num, wins) @ found == pytest.approx(power, abs=0.03)
    assert prompts_for_sign_test(wins, ties=0.5, power=power) == pytest.approx(2 * num, abs=2)


def test_raters_help_as_far_as_they_disagree() -> None:
    one = prompts_for_win_rate(0.03)
    assert prompts_for_win_rate(0.03, raters=5, alpha=1) == one
    assert prompts_for_win_rate(0.03, raters=5, alpha=0) == pytest.approx(one / 5, abs=1)
    assert prompts_for_win_rate(0.03, raters=5, alpha=0.5) == pytest.approx(0.6 * one, abs=1)
    rng = np.random.default_rng(0)
    spread, raters, alpha = 0.5, 5, 0.4  # beta(a, a): the correlation of two votes is 1 / (2 a + 1)
    num = prompts_for_win_rate(spread / 10, raters=raters, alpha=alpha)
    a = (1 / alpha - 1) / 2
    shares = rng.binomial(raters, rng.beta(a, a, (4000, num))).mean(axis=1) / raters
    assert 1.96 * shares.std() == pytest.approx(spread / 10, rel=0.05)


@pytest.mark.parametrize("vote,majority", [(0.6, 0.68), (0.7, 0.84), (0.8, 0.94)])
def test_majorities_amplify_the_vote_share(vote: float, majority: float) -> None:
    assert round(majority_shares(vote, 1 - vote).win, 2) == majority


@pytest.mark.parametrize(
    "win,tie,none", [(0.8, 0.15, 0.03), (0.6, 0.3, 0.15), (0.45, 0.35, 0.30), (1 / 3, 1 / 3, 0.37)]
)
def test_majority_shares_are_those_of_every_outcome(win: float, tie: float, none: float) -> None:
    lose = 1 - win - tie
    shares = majority_shares(win, lose)
    assert sum(shares) == pytest.approx(1) and round(shares.no_majority, 2) == none
    counts = np.array([(i, j, 5 - i - j) for i in range(6) for j in range(6 - i)])
    chances = stats.multinomial.pmf(counts, 5, [win, tie, lose])
    assert shares[:3] == pytest.approx([chances[counts[:, k] >= 3].sum() for k in range(3)])


@pytest.mark.parametrize(
    "plan,match",
    [
        (lambda: prompts_for_win_rate(0), "half_width is 0: no number of prompts"),
        (lambda: prompts_for_win_rate(3), "half_width is 3: it is a share"),
        (lambda: prompts_for_win_minus_lose(0.03, ties=1), "ties is 1"),
        (lambda: prompts_for_sign_test(0.5), "wins is 0.5: no number"),
    ],
)
def test_plans_that_cannot_be_met_are_refused(plan, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan()
