"""Heads learn planted directions, by penalties and scores that others would compute."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.stats import mannwhitneyu

from emu_lightning.curation import head
from emu_lightning.curation.head import fit_head


def planted(num: int = 400, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of uneven scale, and what is to be found in them."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((num, dim)) * np.linspace(0.1, 2, dim) + 1
    return embeddings, embeddings @ np.linspace(-1, 1, dim)[::-1]


def test_true_and_false_are_told_apart_on_pictures_not_seen() -> None:
    embeddings, truth = planted()
    fresh, truth_of_fresh = embeddings[300:], truth[300:]
    found = fit_head(embeddings[:300], truth[:300] > np.median(truth))
    says = fresh @ found.weight + found.bias > 0
    assert np.mean(says == (truth_of_fresh > np.median(truth))) > 0.93
    assert found.score > 0.98


def test_probabilities_are_probabilities() -> None:
    """Of fresh pictures that are said to be true with 70 to 90 percent, about so many are."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((6000, 4))
    p = 1 / (1 + np.exp(-embeddings @ np.array([1.5, -1.0, 0.5, 0.0])))
    truth = rng.random(6000) < p
    says = fit_head(embeddings[:2000], truth[:2000])(embeddings[2000:])
    assert np.abs(says - p[2000:]).max() < 0.1
    some = (says > 0.7) & (says < 0.9)
    assert np.mean(truth[2000:][some]) == pytest.approx(says[some].mean(), abs=0.04)


def test_numbers_are_found_and_noise_is_not() -> None:
    embeddings, truth = planted()
    found = fit_head(embeddings, truth)
    np.testing.assert_allclose(embeddings @ found.weight + found.bias, truth, atol=0.01)
    assert found.score > 0.999 and found.penalty == min(head.PENALTIES)
    noise = fit_head(embeddings, np.random.default_rng(1).standard_normal(400))
    assert noise.score < 0.02


def test_the_score_of_true_and_false_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.4
    expected = mannwhitneyu(scores[labels], scores[~labels]).statistic / labels.sum() / (~labels).sum()
    assert head._auc(scores, labels) == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_solutions_are_where_the_slope_is_zero(penalty: float) -> None:
    embeddings, truth = planted(60, 4)
    yes = (truth > np.median(truth)).astype(float)

    def ridge(p: np.ndarray) -> float:
        return float(np.mean((embeddings @ p[:-1] + p[-1] - truth) ** 2) + penalty * p[:-1] @ p[:-1])

    def logistic(p: np.ndarray) -> float:
        chance = 1 / (1 + np.exp(-(embeddings @ p[:-1] + p[-1])))
        entropy = -np.mean(yes * np.log(chance) + (1 - yes) * np.log(1 - chance))
        return float(entropy + penalty / 2 * p[:-1] @ p[:-1])

    for objective, (weight, bias) in (
        (ridge, head._ridge(embeddings, truth, penalty)),
        (logistic, head._logistic(embeddings, yes, penalty)),
    ):
        slope = approx_fprime(np.append(weight, bias), objective, 1e-6)
        np.testing.assert_allclose(slope, 0, atol=1e-3)


def test_each_fold_has_its_share_of_both_kinds() -> None:
    labels = np.random.default_rng(3).random(101) < 0.2
    fold = head._folds(labels, 101, 0)
    for kind in (labels, ~labels):
        counts = np.bincount(fold[kind], minlength=head.NUM_FOLDS)
        assert counts.max() - counts.min() <= 1


def test_too_few_labels_are_refused() -> None:
    embeddings, truth = planted(30, 4)
    with pytest.raises(ValueError, match="30 labels with 1 values are too few"):
        fit_head(embeddings, np.ones(30, bool))
    with pytest.raises(ValueError, match="too few"):
        fit_head(embeddings[:6], truth[:6])
