"""The mathematics of sets: features in, a number out. All sums are in double precision.

Features are (N, D), one row a picture. Memory grows with N, not with its square.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCK = 1024  # rows of a matrix of distances that are held at once


def frechet_distance(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    The trace of the root of S1 S2 is the sum of the singular values of R1 R2^T, where S = R^T R: no root of a
    matrix is taken, so that a covariance without full rank (fewer pictures than features) needs no care.

    Args:
        x, y: (N, D) and (M, D), of two rows or more.

    Returns:
        At least 0. Biased upwards, the more the fewer pictures.
    """
    (mean_x, root_x), (mean_y, root_y) = (_moments(values) for values in (x, y))
    roots = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    squares = ((mean_x - mean_y) ** 2).sum() + (root_x**2).sum() + (root_y**2).sum()
    return max(0.0, float(squares - 2 * roots))


def _moments(x: NDArray[Any]) -> tuple[Array, Array]:
    """Mean (D,), and R (min(N, D), D) with R^T R the unbiased covariance."""
    if len(x) < 2:
        raise ValueError(f"a covariance needs two pictures or more, there is {len(x)}")
    values = np.asarray(x, np.float64)
    mean: Array = values.mean(axis=0)
    root: Array = np.linalg.qr(values - mean, mode="r")  # type: ignore[assignment]  # numpy types it wrong
    return mean, root / math.sqrt(len(values) - 1)


def kernel_distance(
    x: NDArray[Any], y: NDArray[Any], subset_size: int, num_subsets: int, seed: int = 0
) -> Array:
    """Unbiased squared MMD with the kernel (a b / D + 1)^3 (Binkowski et al. 2018, section 4).

    Args:
        x, y: (N, D) and (M, D).
        subset_size: rows of each, drawn without replacement, that one estimate is of.
        num_subsets: estimates.
        seed: of the drawing.

    Returns:
        (num_subsets,) estimates, each of which may be negative.

    Raises:
        ValueError: a set is smaller than a subset, or a subset smaller than 2.
    """
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size={subset_size}: choose 2 to {min(len(x), len(y))}, so many pictures there are"
        )
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(num_subsets):
        a, b = (
            np.asarray(values[rng.choice(len(values), subset_size, replace=False)], np.float64)
            for values in (x, y)
        )
        within = [_cubic(a, a), _cubic(b, b)]
        same = sum(float(kernel.sum() - kernel.trace()) for kernel in within)
        estimates.append(same / (subset_size * (subset_size - 1)) - 2 * float(_cubic(a, b).mean()))
    return np.array(estimates)


def _cubic(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def maximum_mean_discrepancy(x: NDArray[Any], y: NDArray[Any], sigma: float) -> float:
    """Squared MMD with the kernel exp(-|a - b|^2 / (2 sigma^2)), biased: pairs of a row with itself count.

    Args:
        x, y: (N, D) and (M, D).
        sigma: width of the kernel.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _mean_kernel(a, a, sigma) + _mean_kernel(b, b, sigma) - 2 * _mean_kernel(a, b, sigma)


def _mean_kernel(x: Array, y: Array, sigma: float) -> float:
    norms = (y**2).sum(axis=1)
    total = 0.0
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        squares = (rows**2).sum(axis=1)[:, None] + norms - 2 * rows @ y.T
        total += float(np.exp(-squares / (2 * sigma**2)).sum())
    return total / (len(x) * len(y))


def vendi_score(x: NDArray[Any], order: float = 1.0) -> float:
    """How many different pictures a set is as good as, by cosine similarity (Friedman and Dieng 2023).

    The Hill number of the eigenvalues of K / N, with K the cosines of all pairs. The order says how much rare
    kinds count (Pasarkar and Dieng 2024): little at large orders, infinity asks for the largest kind only.

    Args:
        x: (N, D); rows are brought to length 1.
        order: above 0; 1 is the exponential of the entropy.

    Returns:
        From 1 (all the same) to min(N, D) (all orthogonal).
    """
    if not order > 0:
        raise ValueError(f"order={order}: it has to be above 0")
    unit = normalised(x)
    values = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
    # What rounding leaves of a zero would count by itself at small orders.
    values = values[values > values.max() * max(unit.shape) * np.finfo(np.float64).eps]
    values /= values.sum()
    if math.isinf(order):
        return float(1 / values.max())
    if order == 1:
        return float(np.exp(-(values * np.log(values)).sum()))
    return float((values**order).sum() ** (1 / (1 - order)))


def precision_recall_density_coverage(
    x: NDArray[Any], reference: NDArray[Any], num_neighbours: int
) -> tuple[float, float, float, float]:
    """How sets overlap, by balls that reach from each picture to its k-th nearest neighbour in its own set.

    Precision and recall are from Kynkäänniemi et al. 2019, density and coverage from Naeem et al. 2020. The
    border belongs to the ball: so the copy of a picture that the reference holds several times lies in it.

    Args:
        x: (N, D), what is judged.
        reference: (M, D).
        num_neighbours: k.

    Returns:
        Precision: share of `x` in some ball of the reference. Recall: share of the reference in some ball of
        `x`. Density: balls of the reference that a picture of `x` lies in, over k; may exceed 1. Coverage:
        share of the reference's balls that hold a picture of `x`.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    most = min(len(x), len(reference)) - 1
    if not 1 <= num_neighbours <= most:
        raise ValueError(f"num_neighbours={num_neighbours}: choose 1 to {most}, so many there are")
    fake, real = (torch.as_tensor(np.asarray(values, np.float64)) for values in (x, reference))
    fake_radii, real_radii = (_radii(values, num_neighbours) for values in (fake, real))
    balls = torch.zeros(len(fake), dtype=torch.int64)  # of the reference, that a picture lies in
    is_recalled, is_covered = [], []
    for rows, radii in zip(real.split(BLOCK), real_radii.split(BLOCK), strict=True):
        distances = _distances(rows, fake)
        inside = distances <= radii[:, None]
        balls += inside.sum(dim=0)
        is_covered.append(inside.any(dim=1))
        is_recalled.append((distances <= fake_radii).any(dim=1))
    return (
        float((balls > 0).double().mean()),
        float(torch.cat(is_recalled).double().mean()),
        float(balls.double().mean() / num_neighbours),
        float(torch.cat(is_covered).double().mean()),
    )


def _radii(x: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row; it is itself the nearest."""
    return torch.cat(
        [_distances(rows, x).topk(num_neighbours + 1, largest=False).values[:, -1] for rows in x.split(BLOCK)]
    )


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Not by products: equal rows have to be exactly 0 apart, and a pair the same in both directions.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def normalised(x: NDArray[Any]) -> Array:
    """Rows brought to length 1, in double precision."""
    values = np.asarray(x, np.float64)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)
