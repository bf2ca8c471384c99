"""What a diffusion learner asks of its network."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from emu_lightning.models.pretrained import Pretrained
from emu_lightning.models.text import Text


class Denoiser(Pretrained, ABC):
    """A network from corrupted data, its time and its text to a prediction.

    Its configuration has `in_channels`, C of x_t and of the prediction.
    """

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, text: Text, size: Tensor | None = None) -> Tensor:
        """Predicts.

        Args:
            x_t: (B, C, H, W).
            t: (B,) in [0, 1]; the network sees 1000 * t, as diffusers' pipelines give it.
            text: of B texts.
            size: (B, 6) or (1, 6) in pixels: original height and width, top and left of the crop, target
                height and width. Networks without size conditioning ignore it.

        Returns:
            The prediction, (B, C, H, W).
        """
