"""Guidance against its formula, diffusers' rescaling, and two separate calls of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.testing import assert_close

from emu_lightning.processes.guidance import guide, guided


@dataclass
class Shift:
    values: Tensor

    def concatenate(self, other: Shift) -> Shift:
        return Shift(torch.cat([self.values, other.values]))


def denoiser(x_t: Tensor, t: Tensor, condition: Shift) -> Tensor:
    return torch.sin(x_t) * t[:, None, None, None] + condition.values[:, None, None, None]


@pytest.fixture
def predictions() -> Tensor:
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_guidance_follows_its_formula(predictions):
    uncond, cond = predictions
    assert torch.equal(guide(uncond, cond, 1.0), cond)
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    assert_close(guide(uncond, cond, 5.0), uncond + 5.0 * (cond - uncond), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(predictions, rescale):
    uncond, cond = predictions
    expected = rescale_noise_cfg(uncond + 5.0 * (cond - uncond), cond, rescale)
    assert_close(guide(uncond, cond, 5.0, rescale), expected, atol=1e-5, rtol=0)


def test_full_rescaling_restores_the_contrast(predictions):
    uncond, cond = predictions
    assert_close(guide(uncond, cond, 7.0, rescale=1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_one_doubled_batch_equals_two_calls(scale):
    x_t, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    cond, uncond = Shift(torch.tensor([1.0, 2.0, 3.0])), Shift(torch.zeros(3))
    calls = []

    def counting(x_t: Tensor, t: Tensor, condition: Shift) -> Tensor:
        calls.append(len(x_t))
        return denoiser(x_t, t, condition)

    prediction = guided(counting, cond, uncond, scale)(x_t, t)
    expected = guide(denoiser(x_t, t, uncond), denoiser(x_t, t, cond), scale)
    assert_close(prediction, expected, atol=1e-5, rtol=0)
    assert calls == [3 if scale == 1 else 6]
