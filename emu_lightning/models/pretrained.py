"""Networks that live in a folder: config.json beside the weights as safetensors, as diffusers has it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn


class Pretrained(ModelMixin, ConfigMixin):
    """diffusers' model, saved and loaded in a precision that is stated."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> Self:
        """Loads what `save` or `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: holds config.json and the weights.
            torch_dtype: of the weights in memory; diffusers would keep the file's.
            **options: see diffusers' `ModelMixin.from_pretrained`.
        """
        model = super().from_pretrained(folder, **{"low_cpu_mem_usage": False, **options})
        # The tensors lie unaligned in the memory of the file; a copy does not. torch's own `to`, because
        # diffusers' warns of modules kept in float32 where there are none.
        return nn.Module.to(deepcopy(model), torch_dtype)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and the weights.

        Args:
            folder: made where it is missing.
            dtype: of the parameters in the file; buffers (statistics) keep their precision.
        """
        model = deepcopy(self).cpu()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
