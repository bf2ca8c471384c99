"""The non-learnable Fourier feature transform on the encoder's input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FourierFeatures(nn.Module):
    r"""Appends sines and cosines of the channel *values*; it has no parameters.

    For each n in ``frequencies``: :math:`\sin(2^n 2\pi x), \cos(2^n 2\pi x)`.
    Source: Kingma et al. 2021, "Variational diffusion models" (VDM), appendix C. Emu (arXiv 2309.15807) says
        that
    it transforms RGB so, but gives neither formula nor frequencies: both are our choice. VDM takes n = 6, 7,
    tuned to the lowest of 8 bits; smaller n resolve coarser differences.

    Args:
        frequencies: the exponents n >= 0; empty makes this the identity.

    Raises:
        ValueError: a frequency is negative or given twice.
    """

    def __init__(self, frequencies: Sequence[int] = ()) -> None:
        super().__init__()
        if any(n < 0 for n in frequencies) or len(set(frequencies)) != len(frequencies):
            raise ValueError(f"Fourier frequencies must be distinct and >= 0, got {list(frequencies)}")
        self.frequencies = tuple(frequencies)

    def num_channels(self, channels: int) -> int:
        """Number of channels that `forward` makes of `channels`."""
        return channels * (1 + 2 * len(self.frequencies))

    def forward(self, x: Tensor) -> Tensor:
        """Transforms (B, C, H, W) in [-1, 1] to (B, C (1 + 2 num_frequencies), H, W): x, all sines, all
        cosines.

        Angles are formed in float32 at least: 2^n 2 pi x has no correct digit left in half precision.
        """
        if not self.frequencies:
            return x
        precise = x if x.dtype == torch.float64 else x.float()
        angles = torch.cat([precise * (2**n * 2 * math.pi) for n in self.frequencies], dim=1)
        return torch.cat([x, angles.sin().to(x.dtype), angles.cos().to(x.dtype)], dim=1)
