"""Low-rank adapters of a denoiser (Hu et al. 2021), by peft."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import recurse_remove_peft_layers
from safetensors.torch import save_file

LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers' `load_lora_weights` looks


@dataclass
class Lora:
    """Adapters W + alpha / rank * B A beside frozen weights W.

    Attributes:
        rank: of B A.
        alpha: strength of the adapters; None is `rank`, so that B A enters as it is.
        targets: endings of the names of the layers that get one. The default, the attention layers that all
            families have, is that of diffusers' own scripts.
    """

    rank: int = 16
    alpha: int | None = None
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(denoiser: Any, lora: Lora) -> None:
    """Freezes a diffusers denoiser and gives it adapters in float32 that change nothing yet.

    Raises:
        ValueError: the rank is below 1, or no layer has a name that is asked for.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    if lora.rank < 1:
        raise ValueError(f"lora.rank={lora.rank}: give at least 1, such as 16")
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = LoraConfig(
        r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets), init_lora_weights="gaussian"
    )
    denoiser.requires_grad_(False)
    try:
        inject_adapter_in_model(config, denoiser)  # diffusers' own `add_adapter` is not in every denoiser
    except ValueError as error:
        raise ValueError(f"lora.targets {list(lora.targets)}: {' '.join(str(error).split())[:200]}") from None
    cast_training_params(denoiser, torch.float32)


def save_lora(denoiser: Any, prefix: str, folder: Path) -> None:
    """Writes the adapters as diffusers' `load_lora_weights` reads them, their strength included.

    Args:
        denoiser: has adapters.
        prefix: its name in the pipeline.
        folder: receives the file.
    """
    from peft.utils import get_peft_model_state_dict

    weights = {
        f"{prefix}.{name}": value.detach().cpu().contiguous()
        for name, value in get_peft_model_state_dict(denoiser).items()
    }
    settings = denoiser.peft_config["default"].to_dict()
    plain = {
        f"{prefix}.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in settings.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(plain, sort_keys=True)}
    save_file(weights, folder / LORA_FILE, metadata)


def merge_lora(denoiser: Any) -> None:
    """Adds the adapters to the weights that they stand beside, and takes them away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(denoiser)
