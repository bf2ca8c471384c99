"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Condition(Protocol):
    """What a denoiser is conditioned on, for B samples; `models.Text` is one."""

    def concatenate(self, other: Self) -> Self:
        """Both batches one after the other."""


C = TypeVar("C", bound=Condition)


def guide(uncond: Tensor, cond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Moves a prediction away from the unconditional one.

    Args:
        uncond: prediction without the condition, (B, ...).
        cond: prediction with it, (B, ...).
        scale: 1.0 returns `cond`, 0.0 `uncond`; above 1.0 exaggerates the condition.
        rescale: in [0, 1]; how far each sample's standard deviation is pulled back to that of `cond`, against
            over-exposure (Lin et al. 2023, eqs. 15 and 16; they use 0.7).

    Returns:
        The guided prediction, (B, ...).
    """
    guided_prediction = torch.lerp(uncond, cond, scale)
    if rescale == 0:
        return guided_prediction
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdim=True) / guided_prediction.std(axes, keepdim=True)
    return guided_prediction * (1 + rescale * (ratio - 1))


def guided(
    denoiser: Callable[[Tensor, Tensor, C], Tensor], cond: C, uncond: C, scale: float, rescale: float = 0.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """Fills a denoiser's condition in, guided: both predictions come from one call on a doubled batch.

    Args:
        denoiser: (x_t (B, C, H, W), t (B,), condition of B) -> prediction.
        cond: the condition of B samples.
        uncond: that of the empty or negative prompts, also of B samples.
        scale: see `guide`; 1.0 costs no second prediction.
        rescale: see `guide`.

    Returns:
        (x_t, t) -> guided prediction, as `Process.sample` takes it.
    """
    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    both = uncond.concatenate(cond)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        without, with_cond = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(without, with_cond, scale, rescale)

    return denoise
