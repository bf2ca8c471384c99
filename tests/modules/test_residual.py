"""A super-resolution stage around its small picture: what it predicts before it has learnt anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emu_lightning.models import PixelUNet, SmallTextEncoder
from emu_lightning.modules import SuperResolutionModule
from emu_lightning.processes import Diffusion

DEVIATION, SIDE = 0.2, 8


def stage(prediction: str) -> SuperResolutionModule:
    return SuperResolutionModule(
        PixelUNet(
            sample_size=SIDE,
            block_channels=(8, 8),
            attention=("none", "none"),
            head_dim=8,
            sequence_dim=8,
            pooled_dim=8,
            norm_groups=4,
            use_low_resolution=True,
        ),
        SmallTextEncoder(dim=8, num_layers=1, num_heads=1, embedding_dim=4),
        Diffusion(prediction=prediction),
        factor=2,
        image_size=SIDE,
        residual_std=DEVIATION,
        ema_decay=None,
    )


class Answers(nn.Module):
    """A network that says one number everywhere."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x_t: Tensor, *_: object, **__: object) -> Tensor:
        return torch.full_like(x_t, self.number)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "x_0"])
@pytest.mark.parametrize("time", [0.1, 0.5, 0.95])
def test_a_silent_network_gives_the_best_linear_estimate(prediction: str, time: float) -> None:
    """Against a regression of x_0 on x_t over many Gaussian pictures around one small picture."""
    module, num = stage(prediction), 4000
    rng = torch.Generator().manual_seed(0)
    small = torch.rand(1, 1, 1, 1, generator=rng).expand(num, 3, SIDE // 2, SIDE // 2)
    x_0 = small[:, :, :1, :1] + DEVIATION * torch.randn(num, 3, SIDE, SIDE, generator=rng)
    t, level = torch.full((num,), time), torch.zeros(num)
    x_t = module.process.corrupt(x_0, torch.randn(x_0.shape, generator=rng), t)
    predicted = module._predict(Answers(0.0), x_t, t, None, small, level)
    found = module.process.predict_x_0(x_t, predicted, t).double().flatten()
    x, y = x_t.double().flatten(), x_0.double().flatten()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    expected = y.mean() + slope * (x - x.mean())
    assert (found - expected).abs().max() < 0.02
    assert (found - y).square().mean() <= 1.01 * (expected - y).square().mean()


@pytest.mark.parametrize("time", [0.02, 0.5, 0.98])
def test_the_networks_target_has_unit_variance(time: float) -> None:
    """The F that would make the prediction exact: found by linearity, from answers 0 and 1."""
    module, num = stage("velocity"), 400
    rng = torch.Generator().manual_seed(1)
    small = torch.zeros(num, 3, SIDE // 2, SIDE // 2)
    x_0 = DEVIATION * torch.randn(num, 3, SIDE, SIDE, generator=rng)
    noise, t = torch.randn(x_0.shape, generator=rng), torch.full((num,), time)
    x_t = module.process.corrupt(x_0, noise, t)
    zero, one = (module._predict(Answers(n), x_t, t, None, small, torch.zeros(num)) for n in (0.0, 1.0))
    wanted = (module.process.target(x_0, noise, t) - zero) / (one - zero)
    assert abs(wanted.std() - 1) < 0.02 and abs(wanted.mean()) < 0.02
