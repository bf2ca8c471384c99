"""What tuning gives and what it costs: consistency, diversity and realism of several checkpoints together.

Astolfi et al. 2024 ("Consistency-diversity-realism Pareto fronts"): one number alone always has a checkpoint
that looks best, and tuning pays for realism with diversity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emu_lightning.evaluation.metrics.measured import Measured, difference


@dataclass(frozen=True)
class CheckpointPoint:
    """One checkpoint by three metrics of any kind.

    Attributes:
        consistency: pictures show their prompts: a mean CLIPScore, VQAScore or DSG.
        diversity: pictures differ: a Vendi score, recall or coverage.
        realism: pictures look real: precision, density, a Fréchet or kernel distance.
    """

    consistency: Measured
    diversity: Measured
    realism: Measured


def pareto_front(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats: at least as good on every axis, and better on one.

    Args:
        points: (N, A), higher is better; equal points are on the front together.

    Returns:
        (N,) mask.
    """
    values = np.asarray(points, np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"points {values.shape} are not (N, A) finite numbers: leave out what is missing")
    others, each = values[None], values[:, None]
    is_beaten_by = np.all(others >= each, axis=-1) & np.any(others > each, axis=-1)  # (N, N)
    return ~np.any(is_beaten_by, axis=1)


def checkpoints_on_front(points: Mapping[str, CheckpointPoint]) -> dict[str, bool]:
    """Which checkpoints are on the front of consistency, diversity and realism, by their names.

    Raises:
        ValueError: a metric is missing, or not comparable across checkpoints: see `check_comparable`.
    """
    first = next(iter(points.values()))
    axes = [axis.name for axis in fields(first)]
    rows = [
        [difference(getattr(point, axis), getattr(first, axis)) for axis in axes] for point in points.values()
    ]
    return dict(zip(points, pareto_front(rows).tolist(), strict=True))
