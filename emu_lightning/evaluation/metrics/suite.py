"""Several metrics of one set of pictures: each that was asked for answers, by its value or by a reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from emu_lightning.evaluation.metrics.embedders import Embedder, Pictures
from emu_lightning.evaluation.metrics.geneval import read_geneval
from emu_lightning.evaluation.metrics.measured import Measured
from emu_lightning.evaluation.metrics.picture_scorers import PictureScorer, Scores
from emu_lightning.evaluation.metrics.set_metrics import SetMetric, embed
from emu_lightning.weights import first_line

MISSING = (OSError, ValueError, ImportError)  # weights, files, packages; anything else is a defect


def measure_pictures(
    scorers: Sequence[PictureScorer], images: Pictures, prompts: Sequence[str]
) -> list[Measured]:
    """The mean score of N pictures by each scorer, with its 95 % interval over prompts.

    Args:
        scorers: of single pictures.
        images: (N, 3, H, W) in [-1, 1], or N pictures.
        prompts: N texts, one for each picture.
    """
    measured: list[Measured] = []
    for scorer in scorers:
        try:
            scores = scorer.score(images, prompts)
            measured.append(
                Measured(
                    scorer.name,
                    float(scores.mean()),
                    num=len(scores),
                    networks=scorer.networks,
                    details={"prompts_cut": int(scorer.cut(prompts).sum())},
                    ci95=_mean_ci95(scores, prompts),
                )
            )
        except MISSING as error:
            measured.append(_missing(scorer.name, error, images))
    return measured


def measure_sets(
    metrics: Sequence[SetMetric], embedder: Embedder, images: Pictures, reference: Pictures | None = None
) -> list[Measured]:
    """Each metric of N pictures on the features of one embedder.

    Args:
        metrics: of sets.
        embedder: makes the features.
        images: (N, 3, H, W) in [-1, 1], or N pictures.
        reference: what they are compared with.
    """
    try:
        features = embed(embedder, images)
        compared = None if reference is None else embed(embedder, reference)
    except MISSING as error:
        return [_missing(name, error, images) for metric in metrics for name in metric.names]
    measured: list[Measured] = []
    for metric in metrics:
        try:
            measured += metric.measure(features, compared)
        except MISSING as error:
            measured += [_missing(name, error, images) for name in metric.names]
    return measured


def measure_geneval(results: str | Path) -> list[Measured]:
    """What :func:`.geneval.read_geneval` reads, or why there is none."""
    try:
        return read_geneval(results)
    except MISSING as error:
        return [Measured("GenEval", None, reason=first_line(error))]


def _missing(name: str, error: Exception, images: Pictures) -> Measured:
    return Measured(name, None, reason=first_line(error), num=len(images))


def _mean_ci95(scores: Scores, prompts: Sequence[str]) -> tuple[float, float] | None:
    """Interval of the mean over prompts, whose pictures resemble each other; none of a single prompt."""
    clusters = np.unique(np.asarray(prompts), return_inverse=True)[1]
    deviations = np.bincount(clusters, scores - scores.mean())
    num = len(deviations)
    if num < 2:
        return None
    variance = float(deviations @ deviations) / len(scores) ** 2 * num / (num - 1)
    half = NormalDist().inv_cdf(0.975) * variance**0.5
    return float(scores.mean()) - half, float(scores.mean()) + half
