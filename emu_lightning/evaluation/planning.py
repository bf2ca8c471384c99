"""How many prompts a comparison needs before it is run.

More raters per prompt do not replace prompts: five raters who agree with an alpha of 0.5 make the interval of
their vote share as narrow as 1.7 times the prompts would, and no number of raters makes it more than twice.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

_Z = NormalDist().inv_cdf(0.975)


def prompts_for_win_rate(
    half_width: float, share: float = 0.5, *, raters: int = 1, alpha: float = 1.0
) -> int:
    """Prompts for a 95 % interval of a win rate no wider than plus or minus ``half_width``.

    Args:
        half_width: above 0, in shares: 0.03 is 3 points.
        share: the expected win rate; a half needs the most.
        raters: votes on a prompt, if the figure is the vote share. A majority is one label: leave it at 1.
        alpha: raters' agreement (Krippendorff's), the correlation of the votes on one prompt.

    Returns:
        The larger of what the normal interval and Wilson's need; Wilson's is the wider one near 0 and 1.
    """
    _check(half_width=half_width, share=share, alpha=alpha)
    variance, z2, h2 = share * (1 - share), _Z**2, half_width**2
    # Wilson's half width is z * sqrt(n * variance + z2 / 4) / (n + z2); solved for n.
    slope = variance - 2 * h2
    wilson = z2 * (slope + math.sqrt(max(0.0, slope**2 - h2 * (4 * h2 - 1)))) / (2 * h2)
    return _prompts(max(z2 * variance / h2, wilson), raters, alpha)


def prompts_for_win_minus_lose(
    half_width: float, ties: float, win_minus_lose: float = 0.0, *, raters: int = 1, alpha: float = 1.0
) -> int:
    """Prompts for a 95 % interval of W - L no wider than plus or minus ``half_width``.

    Args:
        half_width: above 0, in shares.
        ties: the expected share of ties; none need the most.
        win_minus_lose: the expected W - L; 0 needs the most.
        raters: as for ``prompts_for_win_rate``, and so is ``alpha``.
    """
    _check(half_width=half_width, ties=ties, win_minus_lose=abs(win_minus_lose), alpha=alpha)
    return _prompts(_Z**2 * (1 - ties - win_minus_lose**2) / half_width**2, raters, alpha)


def prompts_for_sign_test(wins: float, ties: float = 0.0, power: float = 0.8, level: float = 0.05) -> int:
    """Prompts for a two-sided sign test to find a difference with probability ``power``.

    By the normal approximation; where some hundred prompts suffice, the exact test's power is up to 3 points
    less.

    Args:
        wins: the better model's share of the decided prompts, not a half: 0.53 for 53:47.
        ties: share of all prompts that no model wins.
        power: probability of a p-value up to ``level``.
        level: of the test; divide it by the number of planned comparisons to be safe under Holm's correction.
    """
    _check(wins=wins, ties=ties, power=power, level=level)
    normal = NormalDist()
    spread = normal.inv_cdf(1 - level / 2) / 2 + normal.inv_cdf(power) * math.sqrt(wins * (1 - wins))
    return math.ceil((spread / (wins - 0.5)) ** 2 / (1 - ties))


class MajorityShares(NamedTuple):
    """Probabilities of what the majority of a prompt's raters says; they add to 1."""

    win: float
    tie: float
    lose: float
    no_majority: float


def majority_shares(win: float, lose: float, raters: int = 5) -> MajorityShares:
    """What majorities make of vote shares, where all raters and prompts are alike: they amplify them.

    Args:
        win: a vote's probability to prefer the model; ties are what ``win`` and ``lose`` leave.
        lose: a vote's probability to prefer the other.
        raters: votes on a prompt.
    """

    def more_than_half(p: float) -> float:
        return sum(
            math.comb(raters, k) * p**k * (1 - p) ** (raters - k) for k in range(raters // 2 + 1, raters + 1)
        )

    shares = more_than_half(win), more_than_half(1 - win - lose), more_than_half(lose)
    return MajorityShares(*shares, 1 - sum(shares))


def _prompts(votes: float, raters: int, alpha: float) -> int:
    """Prompts that say as much as independent ``votes``: Kish's design effect of ``raters`` on each."""
    return math.ceil(votes * (1 + (raters - 1) * alpha) / raters)


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: it is a share, in [0, 1]")
    for name, empty in (("half_width", 0), ("wins", 0.5), ("ties", 1)):
        if shares.get(name) == empty:
            raise ValueError(f"{name} is {empty}: no number of prompts is enough")
