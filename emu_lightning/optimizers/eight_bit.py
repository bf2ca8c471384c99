"""AdamW whose two moments take one byte a weight each.

Apart from the package's other optimizers, because it needs torchao: `pip install emu_lightning[optimizers]`.
"""

from __future__ import annotations

from typing import Any

from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's AdamW with blockwise 8-bit moments (Dettmers et al. 2022), in checkpoints that can be read.

    torchao's own state is of a class of tensors that Lightning (2.6.6) writes but cannot load. Here a
    checkpoint holds the plain tensors that it consists of.
    """

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return saved | {"state": _each(saved["state"], _taken_apart)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"state": _each(state_dict["state"], _put_together)})


def _each(state: dict[int, dict[str, Any]], change: Any) -> dict[int, dict[str, Any]]:
    return {index: {name: change(value) for name, value in of.items()} for index, of in state.items()}


def _taken_apart(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    names, (signed, dtype) = value.__tensor_flatten__()
    return {"tensors": {name: getattr(value, name) for name in names}, "signed": signed, "dtype": dtype}


def _put_together(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return OptimState8bit.__tensor_unflatten__(value["tensors"], (value["signed"], value["dtype"]))
