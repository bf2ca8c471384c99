"""Two models' pictures of the same prompts, judged: the paper's two questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu_lightning.evaluation.generation import PictureFolder, to_images
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.evaluation.votes import WinRate, judge_pairs, win_rate


@dataclass(frozen=True)
class Comparison:
    """Scores (N,) of base and tuned pictures, labels A (base), B (tuned) or Tie, and what they add up to."""

    base_appeal: NDArray[np.float64]
    tuned_appeal: NDArray[np.float64]
    base_faithfulness: NDArray[np.float64]
    tuned_faithfulness: NDArray[np.float64]
    appeal_labels: NDArray[np.str_]
    faithfulness_labels: NDArray[np.str_]
    appeal: WinRate
    faithfulness: WinRate


def compare(
    scorer: Scorer,
    base: NDArray[np.uint8],
    tuned: NDArray[np.uint8],
    prompts: Sequence[str],
    *,
    appeal_margin: float = 0.02,
) -> Comparison:
    """Judges pictures (N, H, W, 3) of the same N prompts at equal seeds.

    Args:
        appeal_margin: two appeals nearer than this are a tie. Faithfulness ties where both show the same
            share of the prompt's facts.
    """
    base_images, tuned_images = to_images(base), to_images(tuned)
    appeals = scorer.appeal(base_images), scorer.appeal(tuned_images)
    faiths = scorer.faithfulness(base_images, prompts), scorer.faithfulness(tuned_images, prompts)
    return _labelled(*appeals, *faiths, prompts, appeal_margin)


def compare_folders(
    scorer: Scorer,
    base: PictureFolder,
    tuned: PictureFolder,
    *,
    batch_size: int = 64,
    appeal_margin: float = 0.02,
) -> Comparison:
    """As :func:`compare`, a batch in memory at a time; pictures may be of any sizes.

    Raises:
        ValueError: the folders are of other prompts than each other.
    """
    if base.prompts != tuned.prompts:
        raise ValueError(
            f"{base.folder} holds pictures of other prompts than {tuned.folder}: judge equal prompts only"
        )
    scores = (_scores(scorer, folder, batch_size) for folder in (base, tuned))
    (base_appeal, base_faith), (tuned_appeal, tuned_faith) = scores
    return _labelled(base_appeal, tuned_appeal, base_faith, tuned_faith, base.prompts, appeal_margin)


def _scores(
    scorer: Scorer, folder: PictureFolder, batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    appeal, faithfulness = np.empty((2, len(folder)))
    for rows, pictures in folder.batches(batch_size):
        images = to_images(pictures)
        appeal[rows] = scorer.appeal(images)
        faithfulness[rows] = scorer.faithfulness(images, folder.prompts[rows])
    return appeal, faithfulness


def _labelled(
    base_appeal: NDArray[np.float64],
    tuned_appeal: NDArray[np.float64],
    base_faithfulness: NDArray[np.float64],
    tuned_faithfulness: NDArray[np.float64],
    prompts: Sequence[str],
    appeal_margin: float,
) -> Comparison:
    appeal_labels = judge_pairs(base_appeal, tuned_appeal, margin=appeal_margin)
    faithfulness_labels = judge_pairs(base_faithfulness, tuned_faithfulness, margin=0.0)
    return Comparison(
        base_appeal,
        tuned_appeal,
        base_faithfulness,
        tuned_faithfulness,
        appeal_labels,
        faithfulness_labels,
        win_rate(appeal_labels, of="B", prompts=prompts),
        win_rate(faithfulness_labels, of="B", prompts=prompts),
    )
