"""The autoencoder of masked generation: between images and ids of a learnt codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from emu_lightning.models.autoencoder import (
    load_trained,
    refuse_other_sides,
    refuse_other_widths,
    start_near_linear,
)
from emu_lightning.models.pretrained import Pretrained

RARE = 0.01  # of the mean share of a code: one that is used less often counts as unused


class VQAutoencoder(Pretrained):
    """diffusers' `VQModel`: pictures as a grid of ids, each the number of a code.

    Latents are scaled to one length before they are compared with codes, as in ViT-VQGAN (Yu et al. 2022;
    there codes are, too). Otherwise commitment is cheapest where latents are tiny: in a run of the miniature
    five of eight channels vanished, the others shrank below a tenth, and codes fell out of use.

    Source: van den Oord et al. 2017 (VQ-VAE) for the codebook; Esser et al. 2021 (VQGAN) for the network;
    Chang et al. 2023 (Muse) for its use.

    Args:
        codebook_size: K, the number of codes.
        code_dim: C, their width.
        block_channels: width per resolution; each level but the last halves the side, so 3 levels are f4, 5
            are f16.
        layers_per_block: residual blocks per level in the encoder; diffusers' decoder has one more.
        norm_groups: groups of every GroupNorm.
        use_mid_attention: one self-attention at the lowest resolution, as VQGAN has it.
        patch_width: None for VQGAN's encoder. Otherwise every patch of f x f pixels is encoded by itself,
            by an MLP of that width, and only the decoder looks across patches (our choice): an id then says
            what is in its place and nothing else, which makes ids easier to predict.

    Raises:
        ValueError: a width is not divisible by `norm_groups`.
    """

    usage: Tensor  # (K,) share of every code in the ids of training lately; zeros before training

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        code_dim: int = 16,
        block_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        norm_groups: int = 32,
        use_mid_attention: bool = True,
        patch_width: int | None = None,
    ) -> None:
        super().__init__()
        refuse_other_widths(block_channels, norm_groups)
        self.vq = VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(block_channels),
            up_block_types=("UpDecoderBlock2D",) * len(block_channels),
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            latent_channels=code_dim,
            num_vq_embeddings=codebook_size,
            norm_num_groups=norm_groups,
            mid_block_add_attention=use_mid_attention,
        )
        if patch_width is not None:
            self.vq.encoder = _patch_encoder(self.downsampling, patch_width, code_dim)
        start_near_linear(self.vq)
        nn.init.normal_(self.codebook.weight)  # the latents' own variance at the start
        self.register_buffer("usage", torch.zeros(codebook_size))

    @property
    def downsampling(self) -> int:
        """Image side over the side of the grid of ids (f)."""
        return 2 ** (len(self.config.block_channels) - 1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution: at its weight `adaptive_weight` compares gradients."""
        return self.vq.decoder.conv_out

    @property
    def codebook(self) -> nn.Embedding:
        """The K codes (K, C)."""
        return self.vq.quantize.embedding

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), not quantised, of length sqrt(C) each.

        Raises:
            ValueError: the images' sides are not multiples of `downsampling`.
        """
        refuse_other_sides(images, self.downsampling)
        latents = self.vq.encode(images).latents.float()
        return functional.normalize(latents, dim=1) * latents.shape[1] ** 0.5

    @torch.no_grad()
    def ids(self, latents: Tensor) -> Tensor:
        """The nearest code of each latent: (B, C, h, w) to (B, h, w) int64 in 0 ... K - 1."""
        vectors = latents.movedim(1, -1).float()
        # k = argmin_j |z - e_j|  (van den Oord et al. 2017, eq. 1)
        distances = torch.cdist(vectors.flatten(0, -2), self.codebook.weight.float())
        return distances.argmin(dim=1).view(vectors.shape[:-1])

    def codes(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) to their codes (B, C, h, w)."""
        return self.codebook(ids).movedim(-1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, C, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.vq.decode(codes, force_not_quantize=True).sample

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.decode(self.codes(ids))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodes, quantises and decodes.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            The reconstructions (B, 3, H, W), not clamped, whose gradient passes the codes by and reaches the
            encoder; the latents and their codes (B, C, h, w); the ids (B, h, w).
        """
        latents = self.encode(images)
        ids = self.ids(latents)
        codes = self.codes(ids)
        straight_through = latents + (codes - latents).detach()  # van den Oord et al. 2017, section 3.2
        return self.decode(straight_through), latents, codes, ids

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through their ids and back, not clamped."""
        return self(images)[0]

    def unused(self) -> Tensor:
        """(K,) bool: codes that training has hardly used lately, which before training are all."""
        return self.usage < RARE / len(self.usage)


def _patch_encoder(side: int, width: int, code_dim: int) -> nn.Sequential:
    """Images (B, 3, H, W) to (B, code_dim, H / side, W / side), each patch by itself."""
    return nn.Sequential(
        nn.PixelUnshuffle(side),
        nn.Conv2d(3 * side**2, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, code_dim, 1),
    )


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy of (K,) shares that sum to 1: how many equally frequent codes would say as much."""
    return torch.special.entr(shares).sum().exp()


def load_vq_autoencoder(folder: str) -> VQAutoencoder:
    """The autoencoder that a run left in ``<run>/pretrained``, for a configuration's ``class_path``.

    Raises:
        FileNotFoundError: no network is there.
        ValueError: it is another network.
    """
    return load_trained(VQAutoencoder, folder)
