"""The patch discriminator of the adversarial reconstruction loss."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches, one logit each (PatchGAN, Isola et al. 2017, section 3.2.2, as LDM uses
    it).

    The published one normalises with BatchNorm; GroupNorm here, so that a logit depends neither on the other
    images of the batch nor on the number of devices.

    Args:
        channels: width of the first layer; doubled per layer, at most 8 times.
        num_layers: halvings of the side. 3 see patches of 70 x 70 pixels, 2 of 34 x 34, 1 of 16 x 16.
        norm_groups: groups of every GroupNorm.

    Raises:
        ValueError: a width is not divisible by `norm_groups`.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm_groups: int = 16) -> None:
        super().__init__()
        if num_layers < 1 or channels % norm_groups:
            raise ValueError(
                f"num_layers={num_layers} must be at least 1 and channels={channels} divisible by "
                f"norm_groups={norm_groups}"
            )
        widths = [channels * min(2**n, 8) for n in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            stride = 2 if n < num_layers else 1  # the last hidden layer looks wider without halving
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_groups, widths[n]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # Isola et al. 2017, appendix 6.2

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]; positive means real."""
        return self.layers(images)
