"""The autoencoder of a diffusers pipeline, in this package's words."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from emu_lightning.models.autoencoder import Rng, refuse_other_sides
from emu_lightning.models.pipeline_folder import load_network, pipeline_folder


class PipelineVAE(nn.Module):
    """A pipeline's `AutoencoderKL`: images to the latents that its denoiser was trained on, and back.

    Pipelines write the latents' shift and scale in three ways: `scaling_factor` alone (SD, SDXL, PixArt),
    with a `shift_factor` (SD3, FLUX), or with `latents_mean` and `latents_std` per channel. All are read.

    Args:
        vae: the network, moved and frozen by whoever holds this module.

    Attributes:
        latent_channels: C of the latents.
        downsampling: image side over latent side.
    """

    shift: Tensor  # (1, C, 1, 1) or (1, 1, 1, 1); latents = (posterior - shift) * scale
    scale: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        config = vae.config
        self.latent_channels: int = config.latent_channels
        self.downsampling: int = 2 ** (len(config.block_out_channels) - 1)
        shift = torch.tensor(config.latents_mean or [config.shift_factor or 0.0])
        scale = config.scaling_factor / torch.tensor(config.latents_std or [1.0])
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, pipeline: str | Path) -> Self:
        """The autoencoder of a pipeline folder or hub id, frozen, in float32 and evaluation mode.

        Raises:
            FileNotFoundError: no pipeline is there, or it has no autoencoder.
            ValueError: the weights are pickles, truncated, or do not fit their config.json.
            OSError: the hub cannot be reached.
        """
        vae = load_network(AutoencoderKL, pipeline_folder(pipeline) / "vae")
        return cls(vae).requires_grad_(False).eval()

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, h, w).

        Takes the posterior's mean, or a sample of it where `rng` is given.

        Raises:
            ValueError: the images' sides are not multiples of `downsampling`.
        """
        refuse_other_sides(images, self.downsampling)
        with torch.autocast(images.device.type, enabled=False):  # SDXL's overflows in float16
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return ((posterior.mode() if rng is None else posterior.sample(rng)) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.vae.decode(latents / self.scale + self.shift).sample
