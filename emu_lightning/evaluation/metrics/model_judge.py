"""Two scorers of pictures as one judge of the paper's two questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from emu_lightning.evaluation.metrics.picture_scorers import PictureScorer
from emu_lightning.evaluation.scorers import Scorer
from emu_lightning.evaluation.votes import Answer, Judgement, Question, judge_pairs


class ModelJudge(Scorer):
    """Judges appeal by one scorer of pictures and faithfulness by another, for `emu evaluate --scorer`.

    It is a model, not a person: one that also tuned the generator, or chose its pictures, must not be the
    only one that reports on them.

    Args:
        appeal: scores pictures without their prompts, such as `AestheticScore`.
        faithfulness: scores pictures with their prompts, such as `VQAScore`.

    Raises:
        ValueError: the scorer of appeal reads prompts, or that of faithfulness does not.
    """

    def __init__(self, appeal: PictureScorer, faithfulness: PictureScorer) -> None:
        if appeal.reads_prompts:
            raise ValueError(
                f"{appeal.name} reads the prompt, which is hidden where appeal is judged: give a scorer of "
                "the picture alone, such as AestheticScore"
            )
        if not faithfulness.reads_prompts:
            raise ValueError(f"{faithfulness.name} does not read the prompt, so it cannot judge faithfulness")
        self.appeal_scorer, self.faithfulness_scorer = appeal, faithfulness

    def appeal(self, images: torch.Tensor) -> NDArray[np.float64]:
        return self.appeal_scorer.score(images, [""] * len(images))

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Scores (B,) in [0, 1]: by the ends of their range, or by a sigmoid where there are none."""
        scores = self.faithfulness_scorer.score(images, prompts)
        low, high = self.faithfulness_scorer.range
        shares = (scores - low) / (high - low) if np.isfinite(high - low) else expit(scores)
        return np.asarray(shares, np.float64)

    def judgements(
        self,
        base: torch.Tensor,
        tuned: torch.Tensor,
        prompts: Sequence[str],
        *,
        appeal_margin: float,
        faithfulness_margin: float,
    ) -> list[Judgement]:
        """Both answers about each pair of pictures, base as A and tuned as B, marked as a model's.

        Args:
            base, tuned: (N, 3, H, W) in [-1, 1], of the same prompts at equal seeds.
            prompts: N texts. Where one is repeated, each of its pairs has a rater of its own, since the later
                of two answers of one rater would replace the earlier.
            appeal_margin, faithfulness_margin: differences up to these are ties, in units of :meth:`appeal`
                and of :meth:`faithfulness`.
        """
        labels = {
            "appeal": judge_pairs(self.appeal(base), self.appeal(tuned), appeal_margin),
            "faithfulness": judge_pairs(
                self.faithfulness(base, prompts), self.faithfulness(tuned, prompts), faithfulness_margin
            ),
        }
        raters = {"appeal": self.appeal_scorer, "faithfulness": self.faithfulness_scorer}
        judgements = []
        for question, scorer in raters.items():
            rater, seen = f"{scorer.name} {scorer.weights_sha256[:12]}", Counter[str]()
            for prompt, label in zip(prompts, labels[question].tolist(), strict=True):
                seen[prompt] += 1
                one = rater if seen[prompt] == 1 else f"{rater}, picture {seen[prompt]}"
                judgements.append(
                    Judgement(prompt, cast(Question, question), cast(Answer, label), one, "model")
                )
        return judgements
