"""The mathematics of sets against formulas written out, other implementations and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from emu_lightning.evaluation.metrics import check_comparable, distances
from emu_lightning.evaluation.metrics.distances import (
    frechet_distance,
    kernel_distance,
    maximum_mean_discrepancy,
    normalised,
    precision_recall_density_coverage,
    vendi_score,
)
from emu_lightning.models.perceptual import PooledFeatures, RandomFeatures


def gaussian(num: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)) + shift


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one not full, where a test has few rows."""
    monkeypatch.setattr(distances, "BLOCK", 7)


# --- Fréchet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [5, 200])  # fewer and more than features
def test_frechet_of_a_set_with_itself_is_zero(num):
    x = gaussian(num, 32, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[::-1] + 1) == pytest.approx(32)  # the mean alone has moved


@pytest.mark.parametrize("num", [12, 300])
def test_frechet_is_the_published_formula(num):
    x, y = gaussian(num, 16, 0), gaussian(num + 5, 16, 1) @ np.diag(np.linspace(0.5, 2, 16)) + 0.3
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(first @ second).real
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(means + np.trace(first + second - 2 * root), rel=1e-5)


def test_frechet_is_that_of_torchmetrics():
    module = PooledFeatures(RandomFeatures(channels=(4, 8)))
    rng = torch.Generator().manual_seed(0)
    metric, features = FrechetInceptionDistance(module), []
    for is_real, top in ((True, 256), (False, 160)):
        pictures = torch.randint(0, top, (40, 3, 12, 12), generator=rng, dtype=torch.uint8)
        metric.update(pictures, real=is_real)
        features.append(module(pictures).numpy())
    assert frechet_distance(*features) == pytest.approx(float(metric.compute()), rel=1e-3)


def test_frechet_is_as_biased_as_check_comparable_says():
    """Two samples of one standard normal: the distance is all bias."""
    for num, stated in ((300, 111), (1000, 34)):
        distance = frechet_distance(gaussian(num, 256, 1), gaussian(num, 256, 2))
        assert distance == pytest.approx(stated, rel=0.03)
        assert f"{stated} " in str(check_comparable.__doc__)


# --- kernels ------------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_direct_formula():
    x, y = gaussian(9, 4, 0), gaussian(9, 4, 1, shift=0.5)

    def kernel(a, b):
        return (sum(a * b) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9)]
    same = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (9 * 8)
    expected = same - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 81
    assert kernel_distance(x, y, subset_size=9, num_subsets=2) == pytest.approx([expected, expected])
    theirs = poly_mmd(torch.from_numpy(x), torch.from_numpy(y), 3, None, 1.0)
    assert expected == pytest.approx(float(theirs))


def test_kernel_distance_is_near_zero_for_equal_distributions():
    estimates = kernel_distance(gaussian(600, 16, 0), gaussian(600, 16, 1), 300, 40)
    apart = kernel_distance(gaussian(600, 16, 0), gaussian(600, 16, 1, shift=0.3), 300, 40)
    assert abs(estimates.mean()) < 0.05 * apart.mean()
    assert estimates.min() < 0 < estimates.max()  # unbiased: as often below zero


def test_kernel_distance_of_subsets_that_are_not_there():
    for size in (1, 11):
        with pytest.raises(ValueError, match=f"subset_size={size}: choose 2 to 10"):
            kernel_distance(gaussian(10, 4, 0), gaussian(12, 4, 1), size, 5)


def test_mmd_is_the_naive_formula(small_blocks):
    x, y = normalised(gaussian(23, 8, 0)), normalised(gaussian(31, 8, 1, shift=1.0))

    def mean(a, b):
        return np.mean([math.exp(-sum((i - j) ** 2) / (2 * 10**2)) for i in a for j in b])

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert maximum_mean_discrepancy(x, y, 10.0) == pytest.approx(expected, rel=1e-9)
    assert maximum_mean_discrepancy(x, x, 10.0) == 0


# --- Vendi --------------------------------------------------------------------------------------------------

ORDERS = [0.1, 0.5, 1.0, 2.0, math.inf]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num", [3, 40])
def test_vendi_of_identical_and_of_orthogonal(order, num):
    assert vendi_score(np.tile(gaussian(1, 16, 0), (num, 1)), order) == pytest.approx(1, abs=1e-6)
    rotation = np.linalg.qr(gaussian(num, num, 1))[0]
    lengths = np.linspace(1, 5, num)[:, None]  # do not count
    assert vendi_score(lengths * rotation, order) == pytest.approx(num)


@pytest.mark.parametrize("order", ORDERS)
def test_vendi_of_kinds_of_known_shares(order):
    """5, 3 and 2 pictures of three orthogonal kinds: the Hill number of the shares."""
    shares = np.array([0.5, 0.3, 0.2])
    x = np.repeat(np.eye(3, 6), [5, 3, 2], axis=0)
    hill = {1.0: math.exp(-(shares * np.log(shares)).sum()), math.inf: 1 / 0.5}
    expected = hill[order] if order in hill else (shares**order).sum() ** (1 / (1 - order))
    assert vendi_score(x, order) == pytest.approx(expected)


def test_vendi_falls_with_its_order_and_knows_no_order_zero():
    scores = [vendi_score(gaussian(50, 8, 0), order) for order in ORDERS]
    assert all(a > b for a, b in zip(scores, scores[1:], strict=False))
    with pytest.raises(ValueError, match="above 0"):
        vendi_score(gaussian(5, 3, 0), 0)


# --- manifolds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_manifolds_are_the_naive_loop(k, small_blocks):
    fake, real = gaussian(25, 3, 0, shift=0.7), gaussian(30, 3, 1)

    def apart(a, b):
        return math.dist(a, b)

    def radius(points, i):
        return sorted(apart(points[i], other) for n, other in enumerate(points) if n != i)[k - 1]

    real_radii, fake_radii = ([radius(points, i) for i in range(len(points))] for points in (real, fake))
    in_real = np.array(
        [[apart(f, r) <= radius for r, radius in zip(real, real_radii, strict=True)] for f in fake]
    )
    in_fake = np.array(
        [[apart(r, f) <= radius for f, radius in zip(fake, fake_radii, strict=True)] for r in real]
    )
    expected = (in_real.any(1).mean(), in_fake.any(1).mean(), in_real.sum() / (k * 25), in_real.any(0).mean())
    assert precision_recall_density_coverage(fake, real, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_manifolds_at_their_ends():
    x = gaussian(20, 4, 0)
    precision, recall, density, coverage = precision_recall_density_coverage(x, x, 3)
    assert (precision, recall, coverage) == (1, 1, 1) and density > 1
    assert precision_recall_density_coverage(x, x + 100, 3) == (0, 0, 0, 0)
    collapsed = np.tile(x[:1], (20, 1))  # one good picture, over and over
    precision, recall, _, coverage = precision_recall_density_coverage(collapsed, x, 3)
    assert precision == 1 and recall == pytest.approx(1 / 20) and coverage < 0.5
    with pytest.raises(ValueError, match="num_neighbours=20: choose 1 to 19"):
        precision_recall_density_coverage(x, x, 20)
