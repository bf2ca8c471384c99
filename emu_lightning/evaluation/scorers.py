"""What every automatic judge offers: the paper's two questions, asked of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Scorer(Protocol):
    """Answers the two questions for each picture on its own; pairs are made by :func:`.votes.judge_pairs`.

    A scorer is a model, not a person: its judgements carry ``rater_kind="model"`` and are never pooled with
    people's. One that also chose the training pictures must not be the only one that reports on them.
    """

    def appeal(self, images: torch.Tensor) -> NDArray[np.float64]:
        """How well each picture is shot, the prompt unseen.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B,) scores, higher is better; their scale is the scorer's own.
        """
        ...

    def faithfulness(self, images: torch.Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """How much of its prompt each picture shows, appeal ignored.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            prompts: B texts, one for each picture.

        Returns:
            (B,) shares in [0, 1].
        """
        ...
