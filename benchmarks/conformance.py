"""How far our mathematics is from diffusers' own: the largest absolute difference of each, in float32.

python benchmarks/conformance.py
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn

from emu_lightning.models import EMA
from emu_lightning.processes import Diffusion, RectifiedFlow
from emu_lightning.processes.gaussian import Prediction, Schedule

SCHEDULES: dict[Schedule, dict[str, object]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
PREDICTIONS: dict[Prediction, int] = {"noise": 0, "velocity": 1}  # what the SNR is divided by, plus SNR
TIMESTEPS = torch.arange(1000)
GAMMA = 5.0


def conformance() -> dict[str, float]:
    """Largest absolute differences: schedule, zero_snr, target, corruption, min_snr, ema, flow."""
    differences = {
        "schedule": max(_schedule(name, zero_snr=False) for name in SCHEDULES),
        "zero_snr": max(_schedule(name, zero_snr=True) for name in SCHEDULES),
        "min_snr": max(_min_snr(name, prediction) for name in SCHEDULES for prediction in PREDICTIONS),
        "ema": _ema(),
        "flow": _flow(),
    }
    corruptions, targets = zip(*(_corruption_and_target(name) for name in SCHEDULES), strict=True)
    return differences | {"corruption": max(corruptions), "target": max(targets)}


def _diffusers(name: Schedule, **config: object) -> DDPMScheduler:
    return DDPMScheduler(1000, **SCHEDULES[name], **config)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs.double()).abs().max().item()


def _schedule(name: Schedule, zero_snr: bool) -> float:
    theirs = _diffusers(name, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    return _distance(Diffusion(name, zero_terminal_snr=zero_snr).alphas_cumprod, theirs)


def _corruption_and_target(name: Schedule) -> tuple[float, float]:
    x_0, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    process, scheduler, t = Diffusion(name), _diffusers(name), TIMESTEPS / 1000
    return (
        _distance(process.corrupt(x_0, noise, t), scheduler.add_noise(x_0, noise, TIMESTEPS)),
        _distance(process.target(x_0, noise, t), scheduler.get_velocity(x_0, noise, TIMESTEPS)),
    )


def _min_snr(name: Schedule, prediction: Prediction) -> float:
    """Against the lines of diffusers' training scripts: min(SNR, gamma) / (SNR, or SNR + 1)."""
    snr = compute_snr(_diffusers(name), TIMESTEPS)
    theirs = snr.clamp(max=GAMMA) / (snr + PREDICTIONS[prediction])
    process = Diffusion(name, prediction=prediction, min_snr_gamma=GAMMA)
    return _distance(process.loss_weight(TIMESTEPS / 1000), theirs)


def _ema(num_steps: int = 200) -> float:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    ours, theirs = EMA(model, decay=0.99), EMAModel(model.parameters(), decay=0.99)
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        ours.update(model)
        theirs.step(model.parameters())
    pairs = zip(ours.model.parameters(), theirs.shadow_params, strict=True)
    return max(_distance(average, shadow) for average, shadow in pairs)


def _flow() -> float:
    """The straight line of rectified flow, at the times of diffusers' scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_0, noise = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    theirs = scheduler.scale_noise(x_0, scheduler.timesteps, noise)
    return _distance(RectifiedFlow(time_shift=3.0).corrupt(x_0, noise, scheduler.sigmas[:1000]), theirs)


if __name__ == "__main__":
    for name, difference in conformance().items():
        print(f"{name:<12} {difference:.1e}")
