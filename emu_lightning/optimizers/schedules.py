"""Learning rates over a run."""

from __future__ import annotations

import math

from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer


class WarmupCosine(LambdaLR):
    """A learning rate that rises in a line from 0, then falls along half a cosine to ``final`` of its height.

    Its length is the configuration's, not a checkpoint's: a run that is resumed with more steps falls slower.

    Args:
        optimizer: its learning rate is the height.
        num_warmup_steps: optimizer steps until the height is reached.
        num_steps: optimizer steps until the end; later ones stay there.
        final: share of the height at the end, in [0, 1].

    Raises:
        ValueError: ``num_warmup_steps`` is negative or not below ``num_steps``, or ``final`` out of range.
    """

    def __init__(
        self, optimizer: Optimizer, num_warmup_steps: int, num_steps: int, final: float = 0.0
    ) -> None:
        if not 0 <= num_warmup_steps < num_steps:
            raise ValueError(
                f"WarmupCosine: num_warmup_steps={num_warmup_steps} must lie in 0 ... num_steps - 1, and "
                f"num_steps is {num_steps}"
            )
        if not 0 <= final <= 1:
            raise ValueError(f"WarmupCosine: final={final} is a share of the learning rate, in [0, 1]")

        def factor(step: int) -> float:
            if step < num_warmup_steps:
                return step / num_warmup_steps
            done = min(1.0, (step - num_warmup_steps) / (num_steps - num_warmup_steps))
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
