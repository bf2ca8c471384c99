"""Dynamic thresholding against its formula (Saharia et al. 2022, section 2.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from emu_lightning.processes import Diffusion


def formula(x_0: Tensor, p: float) -> Tensor:
    """s = max(percentile(|x_0|, p), 1) of every picture; clip(x_0, -s, s) / s."""
    pictures = []
    for picture in x_0.double().numpy():
        s = max(np.quantile(np.abs(picture), p), 1.0)
        pictures.append(np.clip(picture, -s, s) / s)
    return torch.tensor(np.stack(pictures)).float()


def drawn(x_0: Tensor, **arguments: object) -> Tensor:
    """What one step makes of a network that says x_0 whatever it sees."""
    process = Diffusion(prediction="x_0", **arguments)  # type: ignore[arg-type]
    return process.sample(lambda x_t, t: x_0, x_0.shape, 1, torch.Generator().manual_seed(0))


def predictions() -> Tensor:
    """One picture within [-1, 1], one a little beyond, one far beyond: each has its own threshold."""
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise[0].clamp(-1, 1), noise[1], 30 * noise[2]])


@pytest.mark.parametrize("sampler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("p", [0.9, 0.995])
def test_it_is_the_formula(sampler: type, p: float) -> None:
    x_0 = predictions()
    result = drawn(x_0, sampler=sampler, dynamic_threshold=p)
    torch.testing.assert_close(result, formula(x_0, p), atol=1e-4, rtol=1e-4)
    assert torch.allclose(result[0], x_0[0], atol=1e-4)  # s is at least 1: nothing is made stronger
    assert not torch.allclose(result[2], x_0[2].clamp(-1, 1), atol=0.1)  # and it is not plain clipping


def test_without_it_predictions_are_left_alone() -> None:
    x_0 = predictions()
    torch.testing.assert_close(drawn(x_0), x_0, atol=1e-3, rtol=1e-4)


def test_a_sampler_that_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no thresholding") as error:
        Diffusion(sampler=EulerDiscreteScheduler, dynamic_threshold=0.995)
    assert "DDIMScheduler" in str(error.value)


@pytest.mark.parametrize("p", [0.0, 1.0, 99.5])
def test_a_share_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"dynamic_threshold=.* not in \(0, 1\).*0\.995"):
        Diffusion(dynamic_threshold=p)


def test_the_description_has_it() -> None:
    description = Diffusion(dynamic_threshold=0.99).describe()
    assert description["init_args"]["dynamic_threshold"] == 0.99
    assert Diffusion().describe()["init_args"]["dynamic_threshold"] is None
