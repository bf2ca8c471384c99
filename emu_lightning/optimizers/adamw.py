"""The default optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


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

    def _init_group(  # of torch's step: appends the tensors that it works on to the lists
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        *others: Any,
    ) -> Any:
        has_complex = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, *others)
        grads[:] = map(_laid_out_like, grads, params)
        return has_complex

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; a checkpoint may be of a run with another memory order of its weights."""
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _laid_out_like(state[name], weight)


def _laid_out_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """`tensor` in the memory order of `weight`, which the fused step takes for granted.

    Autograd lets the strides of a gradient differ along sides of 1; compiled 1 x 1 convolutions do, and on a
    GPU the step would refuse them (pytorch issue 126585).
    """
    if tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight).copy_(tensor)
