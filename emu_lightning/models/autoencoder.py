"""The KL autoencoder between images and normalised latents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from emu_lightning.models.fourier import FourierFeatures
from emu_lightning.models.pretrained import Pretrained

Rng = torch.Generator | list[torch.Generator]
N = TypeVar("N", bound=Pretrained)


class Autoencoder(Pretrained):
    """diffusers' `AutoencoderKL` behind Fourier features, with the latents' shift and scale beside its
    weights.

    Source: Rombach et al. 2022 (LDM) for the network; Dai et al. 2023 (Emu), section 3.1, for more latent
        channels
    and the Fourier features.

    Args:
        latent_channels: C of the latents.
        block_channels: width per resolution; each level but the last halves the side, so 3 levels are f4, 4
            are f8.
        layers_per_block: residual blocks per level in the encoder; diffusers' decoder has one more.
        fourier_frequencies: exponents of `FourierFeatures`; empty means RGB only.
        norm_groups: groups of every GroupNorm.
        use_mid_attention: one self-attention at the lowest resolution, as LDM and SDXL have it. It is
            quadratic in the number of latent pixels.

    Raises:
        ValueError: a width is not divisible by `norm_groups`.
    """

    # latents = (posterior - latent_mean) / latent_std
    latent_mean: Tensor  # (C,)
    latent_std: Tensor  # (C,)

    @register_to_config
    def __init__(
        self,
        latent_channels: Literal[4, 8, 16] = 4,
        block_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        fourier_frequencies: Sequence[int] = (),
        norm_groups: int = 32,
        use_mid_attention: bool = True,
    ) -> None:
        super().__init__()
        refuse_other_widths(block_channels, norm_groups)
        self.fourier = FourierFeatures(fourier_frequencies)
        self.kl = AutoencoderKL(
            in_channels=self.fourier.num_channels(3),
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(block_channels),
            up_block_types=("UpDecoderBlock2D",) * len(block_channels),
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            mid_block_add_attention=use_mid_attention,
        )
        start_near_linear(self.kl)
        _start_narrow(self.kl)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def downsampling(self) -> int:
        """Image side over latent side (Emu's f)."""
        return 2 ** (len(self.config.block_channels) - 1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution: at its weight `adaptive_weight` compares gradients."""
        return self.kl.decoder.conv_out

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The encoder's Gaussian over unscaled latents.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            A distribution of (B, C, H / downsampling, W / downsampling).

        Raises:
            ValueError: the images' sides are not multiples of `downsampling`.
        """
        refuse_other_sides(images, self.downsampling)
        return self.kl.encode(self.fourier(images)).latent_dist

    def forward(self, images: Tensor, rng: Rng | None = None) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Encodes and decodes.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            rng: draws the posterior's noise, one generator or one a sample; None takes its mean.

        Returns:
            The reconstructions (B, 3, H, W), not clamped, and the posterior.
        """
        posterior = self.posterior(images)
        sample = posterior.mode() if rng is None else posterior.sample(rng)
        return self.kl.decode(sample).sample, posterior

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) of zero mean and unit variance per channel.

        Takes the posterior's mean, or a sample of it where `rng` is given.
        """
        posterior = self.posterior(images)
        sample = posterior.mode() if rng is None else posterior.sample(rng)
        return (sample - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.kl.decode(latents * _per_channel(self.latent_std) + _per_channel(self.latent_mean)).sample

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through the posterior's mean and back, not clamped."""
        return self(images)[0]

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Tensor]) -> None:
        """Sets `latent_mean` and `latent_std` to the moments of the posterior's samples, per channel.

        The variance is that of the means plus the mean of the variances (law of total variance), so nothing
        random enters.

        Args:
            batches: images (B, 3, H, W) in [-1, 1] each, on the weights' device.

        Raises:
            ValueError: there is no batch.
        """
        count = 0
        total, squares = torch.zeros(2, len(self.latent_mean), dtype=torch.float64, device=self.device)
        for images in batches:
            posterior = self.posterior(images)
            mean, variance = posterior.mean.double(), posterior.var.double()
            count += mean.numel() // mean.shape[1]
            total += mean.sum(dim=(0, 2, 3))
            squares += (mean.square() + variance).sum(dim=(0, 2, 3))
        if not count:
            raise ValueError("latents cannot be measured without pictures: give at least one batch")
        self.latent_mean.copy_(total / count)
        self.latent_std.copy_((squares / count - (total / count).square()).clamp(min=0).sqrt())


def load_autoencoder(folder: str) -> Autoencoder:
    """The autoencoder that a run left in ``<run>/pretrained``, for a configuration's ``class_path``.

    Raises:
        FileNotFoundError: no network is there.
        ValueError: it is another network.
    """
    return load_trained(Autoencoder, folder)


def load_trained(network: type[N], folder: str) -> N:
    """The autoencoder of class `network` in a folder.

    Raises:
        FileNotFoundError: no network is there.
        ValueError: it is another network.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"no autoencoder in {folder}: train one first, its run leaves it in <run>/pretrained"
        )
    found = class_name(folder)
    if found != network.__name__:
        raise ValueError(
            f"{folder} holds a network of class {found}, where class {network.__name__} is needed"
        )
    return network.from_pretrained(folder)


def class_name(folder: str | Path) -> str | None:
    """Of the network whose config.json a folder holds."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_class_name")


def refuse_other_sides(images: Tensor, downsampling: int) -> None:
    """Raises ValueError where `downsampling` does not divide both sides of the images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    if height % downsampling or width % downsampling:
        raise ValueError(
            f"images of {height}x{width} do not fit an autoencoder of downsampling {downsampling}: "
            "resize them so that it divides both sides"
        )


def refuse_other_widths(block_channels: Sequence[int], norm_groups: int) -> None:
    """Raises ValueError where a width is not divisible by `norm_groups`."""
    unfit = [channels for channels in block_channels if channels % norm_groups]
    if unfit:
        raise ValueError(f"block_channels {unfit} are not divisible by norm_groups={norm_groups}")


def start_near_linear(network: nn.Module) -> None:
    """Residual branches start at zero, all other convolutions keep the variance.

    With torch's default initialisation the signal shrinks at every convolution, and a posterior of unit
    variance drowns it: a 64-pixel world was at 22 dB after 300 steps, and at 28 dB from this start (with a
    narrow posterior) after 250.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all of diffusers' have one
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)


def _start_narrow(kl: AutoencoderKL) -> None:
    """The posterior starts narrow and knows of the picture's RGB alone."""
    log_variance = slice(kl.config.latent_channels, None)  # the second half of the moments
    nn.init.constant_(kl.quant_conv.bias[log_variance], -6.0)
    if kl.config.in_channels > 3:  # Fourier features are not linear in the picture
        nn.init.kaiming_normal_(kl.encoder.conv_in.weight[:, :3], nonlinearity="linear")
        nn.init.zeros_(kl.encoder.conv_in.weight[:, 3:])
    with torch.no_grad():
        kl.quant_conv.weight[log_variance] *= 0.1


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
