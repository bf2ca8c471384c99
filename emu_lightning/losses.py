"""Losses of the autoencoder.

All are means: per colour value, per image, over the batch; those of a codebook per value of the latents. LDM
sums over the values of an image instead; dividing its objective by their number gives this one, with equal
relative weights, but here neither the size of the loss nor that of any weight depends on the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def reconstruction_loss(reconstructions: Tensor, images: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute or squared difference of two (B, 3, H, W); a scalar."""
    difference = functional.l1_loss if kind == "l1" else functional.mse_loss
    return difference(reconstructions, images)


def kl_loss(mean: Tensor, logvar: Tensor, num_values: int) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the latents and divided by the image's values.

    Args:
        mean: (B, C, h, w).
        logvar: (B, C, h, w).
        num_values: 3 H W of the image, so that a weight means the same as in LDM (Rombach et al. 2022,
            appendix G).

    Returns:
        A scalar, in nats per colour value.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / (len(mean) * num_values)


def codebook_loss(latents: Tensor, codes: Tensor) -> Tensor:
    """mean |sg[z] - e|^2: draws codes to what is encoded as them (van den Oord et al. 2017, eq. 3, second
    term).

    Args:
        latents: z (B, C, h, w); no gradient reaches them.
        codes: e (B, C, h, w), the nearest code of each.

    Returns:
        A scalar, per value of the latents, as `commitment_loss`.
    """
    return functional.mse_loss(codes, latents.detach())


def commitment_loss(latents: Tensor, codes: Tensor) -> Tensor:
    """mean |z - sg[e]|^2: keeps the encoder at its codes (van den Oord et al. 2017, eq. 3, third term).

    It is the one whose weight is called beta, there 0.25. diffusers' `VectorQuantizer` by default, for the
    sake of old weights, gives beta to the other.
    """
    return functional.mse_loss(latents, codes.detach())


def perceptual_distance(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """LPIPS without learnt weights (Zhang et al. 2018, eq. 1 with w = 1), averaged over the networks' layers.

    Args:
        features: maps (B, C_i, h_i, w_i) of the one picture.
        targets: those of the other.

    Returns:
        (B,), from 0 to 4: squared distance of feature vectors of unit length, averaged over pixels and
        layers.
    """
    unit = functional.normalize  # over channels; eps 1e-12 keeps featureless places at zero
    layers = [
        (unit(x.float()) - unit(y.float())).square().sum(dim=1).mean(dim=(1, 2))
        for x, y in zip(features, targets, strict=True)
    ]
    return torch.stack(layers).mean(dim=0)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))): Lim & Ye 2017; the half is LDM's."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean(fake): logits of reconstructions should rise (Lim & Ye 2017)."""
    return -fake.mean()


def adaptive_weight(towards_data: Tensor, towards_real: Tensor) -> Tensor:
    """Weight that makes two losses pull equally at the decoder's last layer (Esser et al. 2021, eq. 7; LDM).

    Args:
        towards_data: gradient of the reconstruction loss, perceptual part included, by the layer's weight.
        towards_real: that of the generator's adversarial loss.

    Returns:
        |towards_data| / (|towards_real| + 1e-4), clamped to [0, 1e4].
    """
    return (towards_data.norm() / (towards_real.norm() + 1e-4)).clamp(0, 1e4)
