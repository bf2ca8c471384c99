"""The default optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class AdamW(torch.optim.AdamW):
    """torch's AdamW with its fused step: one pass over weights, gradients and moments.

    torch's own ``fused=True`` cannot be used under mixed precision with clipped gradients: Lightning (2.6.6)
    refuses it, because such an optimizer offers to unscale gradients itself, after they would be clipped.
    This one does not offer it.

    Args:
        params: parameters.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False
