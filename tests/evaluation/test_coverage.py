"""Do 95 % intervals hold the truth in at least 93 % of 300 comparisons judged by simulated raters?

Prompts favour one model by amounts that vary (1.2 logits), raters lean towards one by 0.6 where they do; the
truth is that of the population they are drawn from.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import emu_lightning.evaluation.votes
from emu_lightning.evaluation.davidson import Comparison, fit_davidson
from emu_lightning.evaluation.planning import majority_shares
from emu_lightning.evaluation.votes import Judgement, majority_labels, win_rate

RUNS, LEAST = 300, 0.93
ANSWERS = np.array(["B", "Tie", "A"])


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch) -> None:
    monkeypatch.setattr(emu_lightning.evaluation.votes, "NUM_DRAWS", 1000)  # of a bootstrap, for time


def shares_at(leaning: np.ndarray) -> np.ndarray:
    """(..., 3): a vote's chances of B, Tie and A at a leaning towards B, in logits."""
    weights = np.exp(np.stack([leaning / 2, np.full_like(leaning, -0.4), -leaning / 2], axis=-1))
    return weights / weights.sum(axis=-1, keepdims=True)


def draw(chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ANSWERS[(rng.random(chances.shape[:-1])[..., None] > chances.cumsum(axis=-1)).sum(axis=-1)]


def judged(
    num_prompts: int, num_raters: int, rater_spread: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, prompts and raters of all votes: five of the raters vote on each prompt."""
    prompts = np.repeat(np.arange(num_prompts), 5)
    raters = rng.permuted(np.tile(np.arange(num_raters), (num_prompts, 1)), axis=1)[:, :5].ravel()
    leaning = rng.normal(0.5, 1.2, num_prompts)[prompts] + rng.normal(0, rater_spread, num_raters)[raters]
    return draw(shares_at(leaning), rng), prompts.astype(str), raters.astype(str)


def population(spread: float) -> np.ndarray:
    """(3,): shares of B, Tie and A over all prompts and raters, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return weights @ shares_at(0.5 + spread * nodes) / weights.sum()


def test_intervals_of_the_majority_cover_what_majorities_say_of_all_prompts() -> None:
    rng = np.random.default_rng(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    majorities = [majority_shares(win, lose) for win, _, lose in shares_at(0.5 + 1.2 * nodes)]
    win, _, lose, _ = weights @ np.array(majorities) / weights.sum()
    covered = Counter[str]()
    for _ in range(RUNS):
        votes = [
            Judgement(p, "appeal", label, r, "person")
            for label, p, r in zip(*judged(150, 20, 0, rng), strict=True)
        ]
        rate = win_rate(list(majority_labels(votes, "appeal").labels.values()), of="B")
        covered["win"] += rate.ci95[0] <= win <= rate.ci95[1]
        for name in ("win_minus_lose_ci95", "win_minus_lose_bootstrap95"):
            low, high = getattr(rate, name)
            covered[name] += low <= win - lose <= high
    assert min(covered.values()) >= LEAST * RUNS and len(covered) == 3, covered


@pytest.mark.parametrize("num_raters", [5, 20])
def test_two_way_intervals_of_the_vote_share_cover_where_narrower_ones_do_not(num_raters: int) -> None:
    rng = np.random.default_rng(1)
    win, _, lose = population(np.hypot(1.2, 0.6))
    covered = Counter[str]()
    for _ in range(RUNS):
        labels, prompts, raters = judged(300, num_raters, 0.6, rng)
        rate = win_rate(labels, of="B", prompts=prompts, raters=raters)  # type: ignore[arg-type]
        independent = win_rate(labels, of="B")
        for name, (low, high), truth in (
            ("two-way", rate.two_way_ci95, win),  # type: ignore[misc]
            ("two-way, difference", rate.win_minus_lose_two_way95, win - lose),  # type: ignore[misc]
            ("prompts only", rate.win_minus_lose_ci95, win - lose),
            ("independent", independent.win_minus_lose_ci95, win - lose),
        ):
            covered[name] += low <= truth <= high
    assert min(covered["two-way"], covered["two-way, difference"]) >= LEAST * RUNS, covered
    assert covered["independent"] < covered["prompts only"] < 0.85 * RUNS, covered


def test_intervals_clustered_by_prompt_cover_the_vote_share_of_raters_who_are_alike() -> None:
    rng = np.random.default_rng(2)
    win, _, lose = population(1.2)
    covered = Counter[str]()
    for _ in range(RUNS):
        labels, prompts, _ = judged(150, 20, 0, rng)
        rate = win_rate(labels, of="B", prompts=prompts)  # type: ignore[arg-type]
        covered["win"] += rate.ci95[0] <= win <= rate.ci95[1]
        for name in ("win_minus_lose_ci95", "win_minus_lose_bootstrap95"):
            low, high = getattr(rate, name)
            covered[name] += low <= win - lose <= high
    assert min(covered.values()) >= LEAST * RUNS and len(covered) == 3, covered


def test_intervals_of_differences_cover_the_strengths_of_three_models(monkeypatch) -> None:
    monkeypatch.setattr(emu_lightning.evaluation.votes, "NUM_DRAWS", 400)
    rng = np.random.default_rng(3)
    truth = {"small": -0.5, "base": 0.0, "large": 0.5}
    pairs = [("small", "base"), ("base", "large"), ("large", "small")]
    chances = shares_at(np.array([truth[b] - truth[a] for a, b in pairs]))
    covered = Counter[tuple[str, str]]()
    for _ in range(RUNS):
        labels = draw(np.broadcast_to(chances, (80, 3, 3)), rng)
        comparisons = [
            Comparison(f"prompt {i}", a, b, label)
            for i, row in enumerate(labels)
            for (a, b), label in zip(pairs, row, strict=True)
        ]
        for (stronger, weaker), (_, (low, high)) in fit_davidson(comparisons).differences.items():
            covered[min(stronger, weaker), max(stronger, weaker)] += (
                low <= truth[stronger] - truth[weaker] <= high
            )
    assert min(covered.values()) >= LEAST * RUNS and len(covered) == 3, covered
