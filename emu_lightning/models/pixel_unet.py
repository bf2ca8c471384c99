"""The denoiser of pixel diffusion: Imagen's U-Nets (Saharia et al. 2022, appendix F)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention

from emu_lightning.models.denoiser import Denoiser
from emu_lightning.models.text import Text

Attention = Literal["none", "text", "full"]
_BLOCK = {
    "none": "Resnet{}sampleBlock2D",
    "text": "SimpleCrossAttn{}Block2D",
    "full": "SimpleCrossAttn{}Block2D",
}
_MIDDLE = {
    "none": "UNetMidBlock2D",
    "text": "UNetMidBlock2DSimpleCrossAttn",
    "full": "UNetMidBlock2DSimpleCrossAttn",
}


class PixelUNet(Denoiser):
    """diffusers' `UNet2DConditionModel` built as Imagen's networks are, and DeepFloyd IF's: `.net`.

    The text enters twice: its sequence as further keys and values of the self-attention, its pooled embedding
    beside the time embedding. A super-resolution stage has three more input channels, the low-resolution
    picture enlarged, and is told how much noise that picture was given.

    Imagen's Efficient U-Net (appendix B.1) is this with many blocks at low sides and few at high ones. Its
    other two changes, skips scaled by 1/sqrt(2) and convolutions behind the change of side, are left out.

    Args:
        in_channels: C of x_t and of the prediction.
        sample_size: side of x_t in training, in pixels; written to the exported configuration only.
        block_channels: width per level, each half the side of the one before.
        layers_per_block: residual blocks per level going down; one more going up.
        attention: per level `none`, `text` (reads the text only) or `full` (also the picture itself).
        head_dim: width of an attention head.
        sequence_dim: D of the text's sequence.
        pooled_dim: P of the pooled text.
        patch_size: pixels per side that are folded into channels before the first convolution and unfolded
            behind the last (Shi et al. 2016). Imagen has 1; 2 costs a quarter.
        use_positions: two more input channels, the row and the column in [-1, 1], so that left can be told
            from right; for networks that see whole pictures. A choice of this package.
        use_low_resolution: the network of a super-resolution stage.
        level_dim: width of the sinusoidal embedding of the low-resolution picture's noise level.
        norm_groups: groups of every GroupNorm.
        middle_attention: of the middle; None is the last level's.

    Raises:
        ValueError: widths, levels, heads and groups do not fit together.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 32,
        block_channels: Sequence[int] = (64, 128),
        layers_per_block: Sequence[int] = (1, 1),
        attention: Sequence[Attention] = ("none", "full"),
        head_dim: int = 32,
        sequence_dim: int = 128,
        pooled_dim: int = 128,
        patch_size: int = 1,
        use_positions: bool = False,
        use_low_resolution: bool = False,
        level_dim: int = 64,
        norm_groups: int = 32,
        middle_attention: Attention | None = None,
    ) -> None:
        super().__init__()
        for name, levels in {"layers_per_block": layers_per_block, "attention": attention}.items():
            if len(levels) != len(block_channels):
                raise ValueError(
                    f"{name} {list(levels)} and block_channels {list(block_channels)} differ in length: give "
                    "one entry per level"
                )
        for name, divisor in {"norm_groups": norm_groups, "head_dim": head_dim}.items():
            unfit = [channels for channels in block_channels if channels % divisor]
            if unfit:
                raise ValueError(f"block_channels {unfit} are not divisible by {name}={divisor}")
        pictures = 2 if use_low_resolution else 1
        middle = middle_attention or attention[-1]
        condition: dict[str, Any] = (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": level_dim,
                "projection_class_embeddings_input_dim": pooled_dim + level_dim,
            }
            if use_low_resolution
            else {"class_embed_type": "projection", "projection_class_embeddings_input_dim": pooled_dim}
        )
        self.net = UNet2DConditionModel(
            sample_size=sample_size // patch_size,
            in_channels=pictures * in_channels * patch_size**2 + 2 * use_positions,
            out_channels=in_channels * patch_size**2,
            down_block_types=tuple(_BLOCK[kind].format("Down") for kind in attention),
            mid_block_type=_MIDDLE[middle],
            up_block_types=tuple(_BLOCK[kind].format("Up") for kind in reversed(attention)),
            only_cross_attention=tuple(kind == "text" for kind in attention),
            mid_block_only_cross_attention=middle == "text",
            block_out_channels=tuple(block_channels),
            layers_per_block=tuple(layers_per_block),
            attention_head_dim=head_dim,  # these blocks take the width, not the number
            cross_attention_dim=sequence_dim,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=norm_groups,
            **condition,
        )
        if any(kind != "none" for kind in (*attention, middle)):
            self.net.set_attn_processor(_PixelsAndText())
        self.text_norm = nn.LayerNorm(sequence_dim)  # before attention reads it, as in Imagen

    @property
    def side_multiple(self) -> int:
        """What height and width must be divisible by: every level halves them."""
        return self.config.patch_size * 2 ** (len(self.config.block_channels) - 1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        size: Tensor | None = None,
        low_resolution: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """As `Denoiser`'s; `size` is ignored.

        Args:
            low_resolution: (B, C, h, w) at the side of the low-resolution pictures, where the network has
                `use_low_resolution`.
            level: (B,) in [0, 1], how much noise they were given.

        Raises:
            ValueError: the network is one of a super-resolution stage and has no low-resolution pictures, or
                the reverse, or the sides of x_t are not multiples of `side_multiple`.
        """
        if (low_resolution is None or level is None) == self.config.use_low_resolution:
            raise ValueError(
                "a PixelUNet with use_low_resolution belongs into a SuperResolutionModule, one without it "
                f"into a DiffusionModule; this one has use_low_resolution={self.config.use_low_resolution}"
            )
        if any(side % self.side_multiple for side in x_t.shape[-2:]):
            height, width = x_t.shape[-2:]
            raise ValueError(
                f"pictures of {height}x{width}: the sides must be multiples of {self.side_multiple}"
            )
        condition: dict[str, Any]
        if low_resolution is None or level is None:
            condition = {"class_labels": text.pooled}
        else:
            enlarged = interpolate(low_resolution, x_t.shape[-2:], mode="bilinear")
            x_t = torch.cat([x_t, enlarged], 1)
            added = {"text_embeds": text.pooled, "time_ids": 1000 * level[:, None]}
            condition = {"added_cond_kwargs": added}
        hidden = pixel_unshuffle(x_t, self.config.patch_size)
        if self.config.use_positions:
            hidden = torch.cat([hidden, _positions(hidden)], 1)
        prediction = self.net(
            hidden,
            1000 * t,
            encoder_hidden_states=self.text_norm(text.sequence),
            encoder_attention_mask=text.mask,
            return_dict=False,
            **condition,
        )[0]
        return pixel_shuffle(prediction, self.config.patch_size)


def _positions(x: Tensor) -> Tensor:
    """Row and column of every pixel in [-1, 1], (B, 2, H, W)."""
    height, width = x.shape[-2:]
    rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)


class _PixelsAndText:
    """diffusers' `AttnAddedKVProcessor2_0` with a mask that is as long as the keys.

    diffusers' pads the text's mask by the number of pixels, except where the text happens to be as long as
    there are pixels, and also where the pixels are no keys; both fail.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> Tensor:
        pixels = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # (B, H * W, C)
        keys, values = attn.add_k_proj(encoder_hidden_states), attn.add_v_proj(encoder_hidden_states)
        mask = attention_mask[:, None]  # (B, 1, 1, L), added to the scores
        if not attn.only_cross_attention:
            keys, values = torch.cat([keys, attn.to_k(pixels)], 1), torch.cat([values, attn.to_v(pixels)], 1)
            mask = pad(mask, (0, pixels.shape[1]))
        query, key, value = (
            attn.head_to_batch_dim(each, out_dim=4) for each in (attn.to_q(pixels), keys, values)
        )
        read = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        read = attn.to_out[0](read.transpose(1, 2).flatten(2))
        return read.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
