"""Exponential moving average of a network's weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


class EMA(nn.Module, Generic[M]):
    """A copy of a network, in `.model`, whose weights trail the trained one's.

    After each optimizer step ``average <- decay * average + (1 - decay) * weights``. It is a plain submodule,
    so it is saved, moved and sharded with the rest; update it before checkpoints are written, in a callback's
    `on_train_batch_end` for example.

    Args:
        model: the network to follow; the average starts as its copy.
        decay: in [0, 1); share of the average that survives an update.
        warmup: start with smaller decays, min(decay, (1 + n) / (10 + n)) after n updates, so that the random
            start is soon forgotten.

    Raises:
        ValueError: `decay` is out of its range.
    """

    num_updates: Tensor

    def __init__(self, model: M, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay={decay} is not in [0, 1): give a value such as 0.999")
        self.model: M = deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self._num_updates = 0  # num_updates without waiting for the GPU
        self.register_load_state_dict_post_hook(_read_num_updates)

    def current_decay(self) -> float:
        """The decay of the next update."""
        ramp = (1 + self._num_updates) / (10 + self._num_updates)
        return min(self.decay, ramp) if self.warmup else self.decay

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begins anew from the weights and buffers of `model`, as if just made from it."""
        self.model.load_state_dict(model.state_dict())
        self._num_updates = 0
        self.num_updates.zero_()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights of `model`, which has the copied network's structure.

        Buffers are copied, not averaged. Where both are sharded alike each process moves its part.
        """
        averages = [_local(average) for average in self.model.parameters()]
        weights = [
            _local(weight).to(average) for weight, average in zip(model.parameters(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.current_decay())
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)
        self._num_updates += 1
        self.num_updates.fill_(self._num_updates)


def _local(weight: Tensor) -> Tensor:
    """The part of a sharded weight that this process has, in the weight's own memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _read_num_updates(ema: Any, incompatible_keys: object) -> None:
    ema._num_updates = int(ema.num_updates)
