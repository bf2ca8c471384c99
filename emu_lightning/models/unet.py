"""The denoiser: a text-conditioned U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from emu_lightning.models.denoiser import Denoiser
from emu_lightning.models.text import Text


class UNet(Denoiser):
    """diffusers' `UNet2DConditionModel` in this package's words; the network itself is `.net`.

    The text enters twice: its sequence by cross-attention, its pooled embedding beside the time embedding.
    With size conditioning this is SDXL's arrangement (Podell et al. 2023, section 2.2), so that `.net` fits a
    stock SDXL pipeline.

    Args:
        in_channels: C of x_t and of the prediction.
        sample_size: side of x_t in training, in latent pixels; written to the exported configuration only.
        block_channels: width per level, each half the side of the one before.
        layers_per_block: residual blocks per level going down; one more going up.
        transformer_layers: attention layers per level, 0 for none. The middle has as many as the last level,
            at least 1.
        head_dim: width of an attention head.
        sequence_dim: D of the text's sequence.
        pooled_dim: P of the pooled text.
        use_size_condition: also condition on original size, crop and target size.
        size_dim: width of the sinusoidal embedding of each of these six numbers; SDXL has 256.
        norm_groups: groups of every GroupNorm.

    Raises:
        ValueError: widths, levels, heads and groups do not fit together.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 8,
        block_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        transformer_layers: Sequence[int] = (1, 1),
        head_dim: int = 32,
        sequence_dim: int = 128,
        pooled_dim: int = 128,
        use_size_condition: bool = False,
        size_dim: int = 64,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(transformer_layers) != len(block_channels):
            raise ValueError(
                f"transformer_layers {list(transformer_layers)} and block_channels {list(block_channels)} "
                "differ in length: give one number per level"
            )
        for name, divisor in {"norm_groups": norm_groups, "head_dim": head_dim}.items():
            unfit = [channels for channels in block_channels if channels % divisor]
            if unfit:
                raise ValueError(f"block_channels {unfit} are not divisible by {name}={divisor}")
        pooled = (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": size_dim,
                "projection_class_embeddings_input_dim": pooled_dim + 6 * size_dim,
            }
            if use_size_condition
            else {"class_embed_type": "projection", "projection_class_embeddings_input_dim": pooled_dim}
        )
        self.net = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=tuple(f"{'CrossAttn' if n else ''}DownBlock2D" for n in transformer_layers),
            up_block_types=tuple(f"{'CrossAttn' if n else ''}UpBlock2D" for n in transformer_layers[::-1]),
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            transformer_layers_per_block=tuple(max(1, n) for n in transformer_layers),
            attention_head_dim=tuple(width // head_dim for width in block_channels),  # their number, here
            cross_attention_dim=sequence_dim,
            use_linear_projection=True,
            norm_num_groups=norm_groups,
            **pooled,
        )

    def forward(self, x_t: Tensor, t: Tensor, text: Text, size: Tensor | None = None) -> Tensor:
        """As `Denoiser`'s.

        Raises:
            ValueError: the U-Net has size conditioning and no size is given.
        """
        if self.config.use_size_condition:
            if size is None:
                raise ValueError("this U-Net has use_size_condition: give size (B, 6) or (1, 6) in pixels")
            size = size.to(x_t.device, torch.float32).expand(len(x_t), 6)
            condition: dict[str, Any] = {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": size}}
        else:
            condition = {"class_labels": text.pooled}
        return self.net(
            x_t,
            1000 * t,
            encoder_hidden_states=text.sequence,
            encoder_attention_mask=text.mask,  # else padding is attended to; costs no CPU time
            return_dict=False,
            **condition,
        )[0]
