"""Networks that are used, but neither trained nor saved with the one that uses them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module, Generic[M]):
    """Holds a pre-trained network outside the tree of modules: no parameters, no state, no gradient.

    So checkpoints, averages, optimizers and strategies never see it, while it follows its holder to a device.
    It is loaded at first use: where all that it would make comes from a cache, it costs no memory at all.

    Args:
        load: makes the network.
        offload: keep it in host memory, where it also computes.
    """

    _place: Tensor

    def __init__(self, load: Callable[[], M], offload: bool = False) -> None:
        super().__init__()
        self.load, self.offload = load, offload
        self._loaded: list[M] = []  # in a list, where torch does not find it
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def is_loaded(self) -> bool:
        return bool(self._loaded)

    @property
    def network(self) -> M:
        """The network, on the device of its holder unless it is off-loaded."""
        if not self._loaded:
            network = self.load().requires_grad_(False).eval()
            self._loaded.append(network if self.offload else network.to(self._place.device))
        return self._loaded[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen[M]:
        super()._apply(fn, recurse)
        if self._loaded and not self.offload:
            self._loaded[0].to(self._place.device)  # its precision is its own, whatever `fn` does
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[M]:
        """A copy shares the network, which nothing changes."""
        copy = type(self)(self.load, self.offload)
        copy._loaded = list(self._loaded)
        copy._place = deepcopy(self._place, memo)
        return copy
