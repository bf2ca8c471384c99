"""Gaussian processes: DDPM-style diffusion and rectified flow behind one interface, plain functions beneath.

Reversal is left to diffusers' schedulers; the forward process, its targets and weights are here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from emu_lightning.processes.seeding import Rng, integers, normal, uniform

Prediction = Literal["noise", "velocity", "x_0"]
Schedule = Literal["cosine", "linear", "scaled_linear"]
# our words -> diffusers' words. cosine: Nichol & Dhariwal 2021, eq. 17. linear: Ho et al. 2020, section 4.
# scaled_linear, linear in the root: latent diffusion, SDXL.
_DIFFUSERS_PREDICTION = {"noise": "epsilon", "velocity": "v_prediction", "x_0": "sample"}
_DIFFUSERS_SCHEDULE: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
_NO_LIMIT = 1e6  # on the threshold s; diffusers' default of 1 turns dynamic thresholding into plain clipping


# ---- conversions: exact inverses of one another where alpha**2 + sigma**2 = 1 ----


def velocity(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha * noise - sigma * x_0 (Salimans & Ho 2022, section 4)."""
    return alpha * noise - sigma * x_0


def velocity_to_x_0(velocity: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = alpha * x_t - sigma * v, where alpha**2 + sigma**2 = 1."""
    return alpha * x_t - sigma * velocity


def velocity_to_noise(velocity: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """noise = sigma * x_t + alpha * v, where alpha**2 + sigma**2 = 1."""
    return sigma * x_t + alpha * velocity


def noise_to_x_0(noise: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = (x_t - sigma * noise) / alpha, for alpha > 0."""
    return (x_t - sigma * noise) / alpha


def x_0_to_noise(x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """noise = (x_t - alpha * x_0) / sigma, for sigma > 0."""
    return (x_t - alpha * x_0) / sigma


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """The loss weight that is min(snr, gamma) on x_0's squared error, stated for the given prediction.

    Source: Hang et al. 2023, section 3.4. A squared error of the noise is snr times, and one of the velocity
    snr + 1 times, that of x_0. At zero terminal SNR the last timestep weighs nothing.

    Args:
        snr: alpha**2 / sigma**2 of any shape, in [0, inf).
        gamma: cap on the SNR; the paper uses 5.
        prediction: what the loss compares.

    Returns:
        Weights of snr's shape.
    """
    if prediction == "noise":
        return (gamma / snr).clamp(max=1.0)  # min(snr, gamma) / snr
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction == "velocity" else capped


def offset_noise(
    shape: Sequence[int],
    strength: float,
    rng: Rng,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian noise plus a constant per image and channel: randn + strength * randn(B, C, 1, 1).

    Emu, sections 3.2 and 3.3: strength 0.02 in the last stage of pre-training, 0.1 in quality-tuning.

    Args:
        shape: (B, C, H, W).
        strength: standard deviation of the constant; 0 draws plain noise.
        rng: generator(s) on `device` or on the CPU. The plain part does not depend on `strength`.
        device: of the result.
        dtype: of the result.

    Returns:
        (B, C, H, W) of variance 1 + strength**2.
    """
    noise = randn_tensor(tuple(shape), generator=rng, device=torch.device(device), dtype=dtype)
    if strength == 0:
        return noise
    constant = randn_tensor((*shape[:2], 1, 1), generator=rng, device=torch.device(device), dtype=dtype)
    return noise + strength * constant


# ---- processes ----


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Process(ABC):
    """How data becomes noise, what a denoiser is asked for in between, and how noise becomes data again.

    Args:
        noise_offset: strength of `offset_noise` in training. Sampling starts from plain noise, as in stock
            pipelines.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, noise_offset: float = 0.0) -> None:
        if noise_offset < 0:
            raise ValueError(f"noise_offset={noise_offset}: give 0 (off) or a positive strength such as 0.1")
        self.noise_offset = noise_offset

    @abstractmethod
    def sample_t(self, batch_size: int, rng: Rng, device: torch.device | str = "cpu") -> Tensor:
        """Training times (B,) in [0, 1], float32, drawn on the generator's device and moved to `device`."""

    @abstractmethod
    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, H, W) from x_0 and noise of that shape and t (B,), in x_0's dtype."""

    @abstractmethod
    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the prediction should be, (B, C, H, W), in x_0's dtype."""

    @abstractmethod
    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight (B,) of each sample's squared error."""

    @abstractmethod
    def predict_x_0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean data (B, C, H, W) that a prediction at x_t implies, in x_t's dtype."""

    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """A fresh diffusers scheduler configured like this process; timesteps are num_train_timesteps * t."""

    def describe(self) -> dict[str, Any]:
        """class_path and init_args of plain values, from which jsonargparse rebuilds this process."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {
            "class_path": _path(type(self)),
            "init_args": {
                name: _path(value) if isinstance(value, type) else value for name, value in arguments.items()
            },
        }

    def set_steps(self, scheduler: Any, num_steps: int) -> None:
        """Spreads `num_steps` over the timesteps, which stay on the CPU so that the loop waits for no GPU."""
        scheduler.set_timesteps(num_steps)

    def noise_like(self, x_0: Tensor, rng: Rng) -> Tensor:
        """Training noise of x_0's shape, device and dtype, with this process's `noise_offset`."""
        return offset_noise(x_0.shape, self.noise_offset, rng, x_0.device, x_0.dtype)

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        shape: Sequence[int],
        num_steps: int,
        rng: Rng,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Turns noise into data.

        Args:
            denoise: (x_t (B, C, H, W), t (B,) in [0, 1]) -> prediction, without gradients.
            shape: (B, C, H, W) of the result.
            num_steps: calls of `denoise`.
            rng: one generator, or a list of B of them, which makes a sample independent of its batch. CPU
                generators give the same noise on every device.
            device: of the computation.
            dtype: of x_t. Predictions are cast to it.

        Returns:
            x_0 (B, C, H, W).

        Raises:
            ValueError: `num_steps` is below 1, or the list of generators does not have B entries.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: give at least 1")
        if isinstance(rng, list) and len(rng) != shape[0]:
            raise ValueError(f"{len(rng)} generators for {shape[0]} samples: give one, or one per sample")
        scheduler: Any = self.scheduler()
        self.set_steps(scheduler, num_steps)
        # diffusers' flow schedulers leave out the two scalings, and samplers without noise the generator
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        draws = {"generator": rng} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x_t = randn_tensor(tuple(shape), generator=rng, device=torch.device(device), dtype=dtype)
        x_t = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            time = (timestep / scheduler.config.num_train_timesteps).to(torch.float32).item()
            # filled on the device: a copy from here would wait until it is done with the step before
            t = torch.full((shape[0],), time, dtype=torch.float32, device=device)
            prediction = denoise(scale(x_t, timestep), t).to(dtype)
            x_t = scheduler.step(prediction, timestep, x_t, **draws, return_dict=False)[0]
        return x_t


class Diffusion(Process):
    """DDPM-style diffusion in discrete time: alpha_t**2 + sigma_t**2 = 1 (Ho et al. 2020).

    Time is t = k / num_timesteps for the timesteps k = 0 ... num_timesteps - 1 of diffusers' schedulers, so
    that a network which multiplies t by 1000 sees a stock pipeline's timesteps where num_timesteps is 1000.

    Emu states none of schedule, prediction, weighting and sampler: the defaults are choices.

    Args:
        schedule: `cosine` (Nichol & Dhariwal 2021), `linear` (Ho et al. 2020) or `scaled_linear` (latent
            diffusion, SDXL); the last two are made for 1000 timesteps.
        num_timesteps: T.
        prediction: what the denoiser predicts.
        zero_terminal_snr: rescale the schedule so that t = 1 is pure noise (Lin et al. 2023).
        min_snr_gamma: cap of the min-SNR weighting (Hang et al. 2023); None weighs all times alike.
        noise_offset: strength of `offset_noise` in training.
        sampler: class of the diffusers scheduler that samples: DDIMScheduler, DPMSolverMultistepScheduler,
            EulerDiscreteScheduler, ...
        dynamic_threshold: p of dynamic thresholding in sampling (Saharia et al. 2022, section 2.3), for
            images in [-1, 1]: every predicted x_0 becomes clip(x_0, -s, s) / s, where s is the quantile p of
            its absolute values, at least 1. Imagen has 0.995; None does without, as latents need.

    Raises:
        ValueError: an argument is out of its range, the sampler is not one for diffusion or does not
            threshold, or zero terminal SNR meets noise prediction.
    """

    def __init__(
        self,
        schedule: Schedule = "cosine",
        num_timesteps: int = 1000,
        prediction: Prediction = "velocity",
        zero_terminal_snr: bool = False,
        min_snr_gamma: float | None = 5.0,
        noise_offset: float = 0.0,
        sampler: type[SchedulerMixin] = DDIMScheduler,
        dynamic_threshold: float | None = None,
    ) -> None:
        super().__init__(noise_offset)
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps={num_timesteps}: give at least 2")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={min_snr_gamma}: give a positive cap such as 5, or null")
        if zero_terminal_snr and prediction == "noise":
            raise ValueError(
                "zero_terminal_snr with prediction 'noise': at SNR 0 the noise says nothing about x_0; "
                "predict 'velocity' or 'x_0'"
            )
        if dynamic_threshold is not None and not 0 < dynamic_threshold < 1:
            raise ValueError(
                f"dynamic_threshold={dynamic_threshold} is not in (0, 1): give a share such as 0.995, or null"
            )
        self.schedule: Schedule = schedule
        self.num_timesteps = num_timesteps
        self.prediction: Prediction = prediction
        self.zero_terminal_snr = zero_terminal_snr
        self.min_snr_gamma = min_snr_gamma
        self.sampler, self.dynamic_threshold = sampler, dynamic_threshold
        self._scheduler_arguments = self._fit_scheduler()
        # alpha**2, (T,) float32: the very numbers of the stock pipelines that this process's models go to
        self.alphas_cumprod: Tensor = DDPMScheduler(
            num_timesteps, **_DIFFUSERS_SCHEDULE[schedule], rescale_betas_zero_snr=zero_terminal_snr
        ).alphas_cumprod
        tables = [self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()]
        self._tables = {torch.device("cpu"): torch.stack(tables)}  # alpha and sigma (2, T) per device

    def timesteps(self, t: Tensor) -> Tensor:
        """Times (B,) in [0, 1] to the nearest timesteps (B,), int64 in 0 ... num_timesteps - 1."""
        return (t * self.num_timesteps).round().long().clamp(0, self.num_timesteps - 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B, 1, 1, 1) float32 each, on t's device."""
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        alpha, sigma = self._tables[t.device][:, self.timesteps(t), None, None, None]
        return alpha, sigma

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t**2 / sigma_t**2, (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square().flatten()

    def sample_t(self, batch_size: int, rng: Rng, device: torch.device | str = "cpu") -> Tensor:
        return (integers(self.num_timesteps, batch_size, rng) / self.num_timesteps).to(device)

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return (alpha * x_0 + sigma * noise).to(x_0.dtype)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "noise":
            return noise
        if self.prediction == "x_0":
            return x_0
        return velocity(x_0, noise, *self.alpha_sigma(t)).to(x_0.dtype)

    def loss_weight(self, t: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(t)
        return min_snr_weight(self.snr(t), self.min_snr_gamma, self.prediction)

    def predict_x_0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x_0":
            return prediction
        to_x_0 = noise_to_x_0 if self.prediction == "noise" else velocity_to_x_0
        return to_x_0(prediction, x_t, *self.alpha_sigma(t)).to(x_t.dtype)

    def scheduler(self) -> SchedulerMixin:
        return self.sampler(**self._scheduler_arguments)

    def _fit_scheduler(self) -> dict[str, Any]:
        """Arguments with which the sampler's class reverses exactly this process."""
        needed = {
            "num_train_timesteps": self.num_timesteps,
            "prediction_type": _DIFFUSERS_PREDICTION[self.prediction],
            **_DIFFUSERS_SCHEDULE[self.schedule],
        }
        if self.zero_terminal_snr:
            needed["rescale_betas_zero_snr"] = True
        if self.dynamic_threshold is not None:
            needed |= {
                "thresholding": True,
                "dynamic_thresholding_ratio": self.dynamic_threshold,
                "sample_max_value": _NO_LIMIT,
            }
        accepted = inspect.signature(self.sampler).parameters
        missing = [name for name in needed if name not in accepted]
        if missing:
            names = ", ".join(missing)
            raise ValueError(
                f"sampler {self.sampler.__name__} has no {names}: choose another, such as DDIMScheduler"
            )
        # Trailing starts at the last timestep, as training does (Lin et al. 2023, section 3.3). Where alpha
        # is almost 0, an error in the noise is a huge one in x_0: noise prediction starts a stride below.
        spacing = "leading" if self.prediction == "noise" else "trailing"
        wanted = {"timestep_spacing": spacing, "clip_sample": False}
        return needed | {name: value for name, value in wanted.items() if name in accepted}


class RectifiedFlow(Process):
    """Straight lines: x_t = (1 - t) * x_0 + t * noise, target noise - x_0 (Liu et al. 2023).

    Args:
        noise_offset: strength of `offset_noise` in training.
        time_shift: s in t -> s * t / (1 + (s - 1) * t), for training and sampling; above 1 moves time towards
            noise, which larger images need (Esser et al. 2024, eq. 23).
        time_sampling: training times before the shift: uniform, or the sigmoid of a standard normal
            (Esser et al. 2024, eq. 19), which favours the middle.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        noise_offset: float = 0.0,
        time_shift: float = 1.0,
        time_sampling: Literal["uniform", "logit_normal"] = "uniform",
    ) -> None:
        super().__init__(noise_offset)
        if time_shift <= 0:
            raise ValueError(f"time_shift={time_shift}: give a positive number; 1 does not shift")
        self.time_shift = time_shift
        self.time_sampling: Literal["uniform", "logit_normal"] = time_sampling

    def sample_t(self, batch_size: int, rng: Rng, device: torch.device | str = "cpu") -> Tensor:
        if self.time_sampling == "uniform":
            t = uniform(batch_size, rng)
        else:
            t = normal(batch_size, rng).sigmoid()
        return (self.time_shift * t / (1 + (self.time_shift - 1) * t)).to(device)

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        return ((1 - t) * x_0 + t * noise).to(x_0.dtype)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x_0

    def loss_weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def predict_x_0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return (x_t - t[:, None, None, None] * prediction).to(x_t.dtype)

    def scheduler(self) -> SchedulerMixin:
        return FlowMatchEulerDiscreteScheduler(shift=self.time_shift)

    def set_steps(self, scheduler: Any, num_steps: int) -> None:
        # Left alone, this scheduler shifts its end points twice and spends its last step on t = 0.001.
        sigmas = torch.linspace(1, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
