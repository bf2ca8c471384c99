"""What makes the same training faster or smaller, switched in one place."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from emu_lightning.parallel import blocks


class Acceleration(Callback):
    """Prepares the trained networks before they are sharded and before training starts.

    Fused attention (SDPA) needs no switch: diffusers uses it. Names and values of weights stay what they are.

    Args:
        compile_blocks: `torch.compile` every residual and transformer block by itself, in place: blocks of
            equal shape share one compilation. Sizes are fixed, so each image size compiles once.
        activation_checkpointing: recompute activations in the backward pass: about a third more computation
            for a fraction of the memory.
        channels_last: weights of convolutions in the memory order that tensor cores want.
        tf32: float32 matrix products in TensorFloat-32, on GPUs that have it. Needless under bfloat16.
    """

    def __init__(
        self,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
        channels_last: bool = False,
        tf32: bool = False,
    ) -> None:
        self.compile_blocks, self.activation_checkpointing = compile_blocks, activation_checkpointing
        self.channels_last, self.tf32 = channels_last, tf32

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        if self.channels_last:
            _order(pl_module, torch.channels_last)
        if self.activation_checkpointing:
            checkpointed = [
                each for each in trained_networks(pl_module) if each._supports_gradient_checkpointing
            ]
            if not checkpointed:
                raise ValueError(_nothing_to(pl_module, "activation_checkpointing"))
            for network in checkpointed:
                network.enable_gradient_checkpointing()
        if self.compile_blocks:
            compiled = [block for network in trained_networks(pl_module) for block in blocks(network)]
            if not compiled:
                raise ValueError(_nothing_to(pl_module, "compile_blocks"))
            # Blocks of one class share their code, and with it torch's limit of 8 compiled forms.
            torch._dynamo.config.recompile_limit = 1024
            torch._dynamo.config.accumulated_recompile_limit = 4096
            torch._dynamo.config.optimize_ddp = False  # cuts what is compiled whole; blocks are cut already
            for block in compiled:
                block.compile(dynamic=False)  # in place: names of weights stay

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.channels_last:
            _order(pl_module, torch.contiguous_format)  # as safetensors wants what is handed over


def trained_networks(module: nn.Module) -> list[ModelMixin]:
    """diffusers' networks in ``module`` that have a trained weight; not averages, not frozen ones."""
    return [
        each
        for each in module.modules()
        if isinstance(each, ModelMixin) and any(weight.requires_grad for weight in each.parameters())
    ]


def _order(module: nn.Module, memory_format: torch.memory_format) -> None:
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=memory_format)  # `contiguous` skips 1 x 1 convolutions


def _nothing_to(module: nn.Module, switch: str) -> str:
    return (
        f"Acceleration.{switch}: no trained network of {type(module).__name__} can do it; set {switch}: false"
    )
