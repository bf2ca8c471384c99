"""The forward process against diffusers and formulas; sampling against a denoiser that knows the data."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_snr
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.testing import assert_close

from emu_lightning.processes import gaussian
from emu_lightning.processes.gaussian import Diffusion, Process, RectifiedFlow

REFERENCES = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
PREDICTIONS = ["noise", "velocity", "x_0"]
EVERY_T = torch.arange(1000) / 1000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(schedule: str, **config: object) -> DDPMScheduler:
    return DDPMScheduler(1000, **REFERENCES[schedule], **config)


def published_betas(schedule: str) -> Tensor:
    """The formulas of the papers, in float64."""
    if schedule == "cosine":  # Nichol & Dhariwal 2021, eq. 17
        time = torch.linspace(0, 1, 1001, dtype=torch.float64)
        signal = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    if schedule == "linear":  # Ho et al. 2020, section 4
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.mark.parametrize("schedule", REFERENCES)
def test_schedules_follow_the_papers(schedule):
    expected = (1 - published_betas(schedule)).cumprod(0)
    assert_close(Diffusion(schedule).alphas_cumprod.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", REFERENCES)
def test_zero_terminal_snr_follows_the_paper(schedule):
    """Lin et al. 2023, algorithm 1: shift and scale alpha so that it ends in 0 and begins as before."""
    alpha = (1 - published_betas(schedule)).cumprod(0).sqrt()
    expected = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    process = Diffusion(schedule, zero_terminal_snr=True)
    assert_close(process.alphas_cumprod.double(), expected, atol=1e-6, rtol=0)
    assert process.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", REFERENCES)
def test_training_and_sampling_have_one_schedule(schedule, zero_terminal_snr):
    process = Diffusion(schedule, zero_terminal_snr=zero_terminal_snr)
    assert torch.equal(process.alphas_cumprod, process.scheduler().alphas_cumprod)


@pytest.mark.parametrize("schedule", REFERENCES)
def test_corruption_and_velocity_are_those_of_diffusers(schedule):
    x_0, noise = torch.randn(2, 1000, 3, 2, 2, generator=seeded())
    process, scheduler, k = Diffusion(schedule), reference(schedule), torch.arange(1000)
    x_t, v_t = process.corrupt(x_0, noise, EVERY_T), process.target(x_0, noise, EVERY_T)
    assert_close(x_t, scheduler.add_noise(x_0, noise, k), atol=1e-6, rtol=0)
    assert_close(v_t, scheduler.get_velocity(x_0, noise, k), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", REFERENCES)
def test_snr_is_that_of_diffusers(schedule):
    process = Diffusion(schedule)
    expected = compute_snr(reference(schedule), torch.arange(1000))
    assert_close(process.snr(EVERY_T), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_follow_the_paper(prediction):
    snr = torch.logspace(-4, 4, 50, dtype=torch.float64)
    on_x_0 = torch.minimum(snr, torch.tensor(5.0))  # Hang et al. 2023, section 3.4
    expected = {"x_0": on_x_0, "noise": on_x_0 / snr, "velocity": on_x_0 / (snr + 1)}[prediction]
    assert_close(gaussian.min_snr_weight(snr, 5.0, prediction), expected, atol=1e-12, rtol=1e-12)


def test_min_snr_weighted_losses_agree_whatever_is_predicted():
    x_0, noise, guess = torch.randn(3, 1000, 1, 1, 1, generator=seeded(), dtype=torch.float64)
    losses = []
    for prediction in PREDICTIONS:
        process = Diffusion("linear", prediction=prediction)
        alpha, sigma = process.alphas_cumprod.sqrt(), (1 - process.alphas_cumprod).sqrt()
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        x_t = alpha * x_0 + sigma * noise
        guessed_noise = gaussian.x_0_to_noise(guess, x_t, alpha, sigma)
        guessed_velocity = gaussian.velocity(guess, guessed_noise, alpha, sigma)
        said = {"x_0": guess, "noise": guessed_noise, "velocity": guessed_velocity}
        error = (said[prediction] - process.target(x_0, noise, EVERY_T)).flatten().square()
        losses.append(process.loss_weight(EVERY_T) * error)
    assert_close(losses[0], losses[2], rtol=1e-4, atol=0)
    assert_close(losses[1], losses[2], rtol=1e-4, atol=0)


def test_without_gamma_all_times_weigh_alike():
    assert_close(Diffusion(min_snr_gamma=None).loss_weight(EVERY_T), torch.ones(1000))
    assert_close(RectifiedFlow().loss_weight(EVERY_T), torch.ones(1000))


def test_conversions_invert_one_another():
    x_0, noise = torch.randn(2, 8, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    angle = torch.linspace(0.01, 1.56, 8, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    x_t = alpha * x_0 + sigma * noise
    v_t = gaussian.velocity(x_0, noise, alpha, sigma)
    assert_close(gaussian.velocity_to_x_0(v_t, x_t, alpha, sigma), x_0, atol=1e-12, rtol=0)
    assert_close(gaussian.velocity_to_noise(v_t, x_t, alpha, sigma), noise, atol=1e-12, rtol=0)
    assert_close(gaussian.noise_to_x_0(noise, x_t, alpha, sigma), x_0, atol=1e-12, rtol=0)
    assert_close(gaussian.x_0_to_noise(x_0, x_t, alpha, sigma), noise, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "process", [*(Diffusion("linear", prediction=prediction) for prediction in PREDICTIONS), RectifiedFlow()]
)
def test_the_target_predicts_x_0(process):
    x_0, noise = torch.randn(2, 16, 3, 4, 4, generator=seeded())
    t = torch.linspace(0, 0.9, 16)
    x_0_again = process.predict_x_0(process.corrupt(x_0, noise, t), process.target(x_0, noise, t), t)
    assert_close(x_0_again, x_0, atol=1e-3, rtol=0)


@pytest.mark.parametrize("process", [Diffusion("linear", zero_terminal_snr=True), RectifiedFlow()])
def test_time_runs_from_data_to_noise(process):
    x_0, noise = torch.randn(2, 1, 3, 4, 4, generator=seeded())
    assert_close(process.corrupt(x_0, noise, torch.zeros(1)), x_0, atol=0.05, rtol=0)
    assert_close(process.corrupt(x_0, noise, torch.ones(1)), noise)


def test_rectified_flow_is_that_of_diffusers():
    x_0, noise = torch.randn(2, 10, 3, 4, 4, generator=seeded())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[::100]
    expected = scheduler.scale_noise(x_0, timesteps, noise)
    assert_close(RectifiedFlow().corrupt(x_0, noise, timesteps / 1000), expected, atol=1e-6, rtol=0)


def test_timesteps_invert_their_times():
    for num_timesteps in (7, 1000):
        process = Diffusion(num_timesteps=num_timesteps)
        k = torch.arange(num_timesteps)
        assert torch.equal(process.timesteps(k / num_timesteps), k)
        assert process.timesteps(torch.ones(1)) == num_timesteps - 1


@pytest.mark.parametrize(
    "process", [Diffusion(), RectifiedFlow(), RectifiedFlow(time_sampling="logit_normal")]
)
def test_times_fill_the_unit_interval(process):
    t = process.sample_t(4000, seeded())
    assert t.shape == (4000,) and t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
    assert t.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(t, process.sample_t(4000, seeded()))


def test_logit_normal_times_and_their_shift_follow_esser_2024():
    t = RectifiedFlow(time_sampling="logit_normal").sample_t(20_000, seeded())
    assert t.logit().mean() == pytest.approx(0, abs=0.03) and t.logit().std() == pytest.approx(1, abs=0.03)
    shifted = RectifiedFlow(time_sampling="logit_normal", time_shift=3.0).sample_t(20_000, seeded())
    assert_close(shifted, 3 * t / (1 + 2 * t))


def test_offset_noise_adds_a_constant_per_image_and_channel():
    x_0 = torch.zeros(500, 4, 8, 8)
    plain = Diffusion().noise_like(x_0, seeded())
    offset = Diffusion(noise_offset=0.5).noise_like(x_0, seeded())
    assert torch.equal(plain, torch.randn(x_0.shape, generator=seeded()))
    assert offset.var() == pytest.approx(1 + 0.5**2, rel=0.02)
    constant = offset - plain
    assert_close(constant, constant[..., :1, :1].expand_as(constant), atol=1e-6, rtol=0)
    assert constant[..., 0, 0].std() == pytest.approx(0.5, rel=0.05)


def test_offset_noise_keeps_the_dtype():
    x_0 = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    assert RectifiedFlow(noise_offset=0.1).noise_like(x_0, seeded()).dtype == torch.bfloat16


@pytest.mark.parametrize("process", [Diffusion(), RectifiedFlow()])
def test_half_precision_data_keep_their_dtype(process):
    x_0, noise, t = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16(), torch.rand(2)
    x_t = process.corrupt(x_0, noise, t)
    target = process.target(x_0, noise, t)
    assert {x_t.dtype, target.dtype, process.predict_x_0(x_t, target, t).dtype} == {torch.bfloat16}


MEAN, STD = 0.7, 0.3


def bayes(process: Process):
    """The best denoiser of data from N(MEAN, STD**2), by Gaussian conditioning."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x_t),) and t.dtype == torch.float32 and 0 <= t.min() and t.max() <= 1
        if isinstance(process, Diffusion):
            alpha, sigma = (value.to(x_t.dtype) for value in process.alpha_sigma(t))
        else:
            sigma = t[:, None, None, None].to(x_t.dtype)
            alpha = 1 - sigma
        x_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        noise = (x_t - alpha * x_0) / sigma
        if not isinstance(process, Diffusion):
            return noise - x_0
        return {"noise": noise, "x_0": x_0, "velocity": alpha * noise - sigma * x_0}[process.prediction]

    return denoise


@pytest.mark.parametrize(
    ("num_steps", "process"),
    [
        (200, Diffusion("cosine")),
        (200, Diffusion("linear", zero_terminal_snr=True)),
        (200, Diffusion("scaled_linear", prediction="x_0")),
        (200, Diffusion("linear", prediction="noise")),
        (100, Diffusion("cosine", num_timesteps=200, prediction="noise")),
        (50, Diffusion("linear", sampler=DPMSolverMultistepScheduler)),  # second order needs fewer steps
        (50, Diffusion("cosine", prediction="noise", sampler=DPMSolverMultistepScheduler)),
        (200, Diffusion("linear", sampler=EulerDiscreteScheduler)),
        (200, Diffusion("linear", zero_terminal_snr=True, sampler=EulerDiscreteScheduler)),
        (200, Diffusion("linear", sampler=DDPMScheduler)),
        (200, RectifiedFlow()),
        (200, RectifiedFlow(time_shift=3.0)),
    ],
)
def test_sampling_recovers_a_known_distribution(num_steps, process):
    x_0 = process.sample(bayes(process), (64, 4, 8, 8), num_steps, seeded())
    assert x_0.mean() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std() == pytest.approx(STD, rel=0.06)


@pytest.mark.parametrize("process", [Diffusion(), RectifiedFlow(time_shift=2.0)])
def test_one_step_lands_on_the_mean(process):
    x_0 = process.sample(bayes(process), (4, 1, 8, 8), 1, seeded())
    assert_close(x_0, torch.full_like(x_0, MEAN), atol=1e-3, rtol=0)


def test_rectified_flow_steps_are_even_before_their_shift():
    times = []
    process = RectifiedFlow(time_shift=3.0)
    process.sample(lambda x_t, t: (times.append(t[0].item()), x_t)[1], (1, 1, 1, 1), 4, seeded())
    even = torch.tensor([1, 0.75, 0.5, 0.25])
    assert_close(torch.tensor(times), 3 * even / (1 + 2 * even))


@pytest.mark.parametrize("process", [Diffusion(), Diffusion(sampler=DDPMScheduler), RectifiedFlow()])
def test_one_generator_per_sample_makes_samples_independent_of_their_batch(process):
    def sample(seeds: list[int]) -> Tensor:
        return process.sample(bayes(process), (len(seeds), 2, 4, 4), 5, [seeded(seed) for seed in seeds])

    assert_close(sample([3, 1, 2])[1:2], sample([1]))


def test_sampling_dtype_is_the_callers():
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return x_t.float()

    for process in (Diffusion(), RectifiedFlow()):
        x_0 = process.sample(denoise, (2, 1, 4, 4), 3, seeded(), dtype=torch.bfloat16)
        assert x_0.dtype == torch.bfloat16


def test_schedulers_are_fresh_and_configured_like_the_process():
    process = Diffusion("scaled_linear", prediction="velocity", zero_terminal_snr=True)
    scheduler = process.scheduler()
    assert scheduler is not process.scheduler()
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.rescale_betas_zero_snr and not scheduler.config.clip_sample
    assert RectifiedFlow(time_shift=3.0).scheduler().config.shift == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diffusion(prediction="noise", zero_terminal_snr=True), "SNR 0"),
        (lambda: Diffusion(num_timesteps=1), "num_timesteps=1"),
        (lambda: Diffusion(min_snr_gamma=0.0), "min_snr_gamma=0"),
        (lambda: Diffusion(noise_offset=-1.0), "noise_offset=-1"),
        (lambda: Diffusion(sampler=FlowMatchEulerDiscreteScheduler), "FlowMatchEulerDiscreteSch.* has no"),
        (lambda: RectifiedFlow(time_shift=0.0), "time_shift=0"),
        (lambda: RectifiedFlow().sample(lambda x_t, t: x_t, (1, 1, 1, 1), 0, seeded()), "num_steps=0"),
        (lambda: RectifiedFlow().sample(lambda x_t, t: x_t, (2, 1, 1, 1), 1, [seeded()]), "1 generators"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--process", type=Process)
    return made


def test_processes_come_from_a_config():
    config = parser().parse_args(
        [
            "--process=emu_lightning.processes.Diffusion",
            "--process.schedule=scaled_linear",
            "--process.min_snr_gamma=null",
            "--process.sampler=diffusers.DPMSolverMultistepScheduler",
        ]
    )
    again = parser().parse_object({"process": config.process.as_dict()})
    process = parser().instantiate(again).process
    assert isinstance(process, Diffusion) and process.min_snr_gamma is None
    assert isinstance(process.scheduler(), DPMSolverMultistepScheduler)
    default = parser().parse_args(["--process=emu_lightning.processes.Diffusion"])
    assert "DDIMScheduler" in parser().dump(default)
    assert isinstance(parser().instantiate(default).process.scheduler(), DDIMScheduler)
    flow = parser().parse_args(["--process=emu_lightning.processes.RectifiedFlow", "--process.time_shift=3"])
    assert parser().instantiate(flow).process.time_shift == 3.0


@pytest.mark.parametrize(
    "process",
    [
        Diffusion("linear", 100, "x_0", True, None, 0.1, DPMSolverMultistepScheduler),
        RectifiedFlow(0.1, 3.0, "logit_normal"),
    ],
)
def test_descriptions_rebuild_their_process(process):
    description = json.loads(json.dumps(process.describe()))
    again = parser().instantiate(parser().parse_object({"process": description})).process
    assert type(again) is type(process) and again.describe() == description
    assert dict(again.scheduler().config) == dict(process.scheduler().config)


def test_a_misspelt_option_is_named():
    with pytest.raises(ArgumentError, match="schedul"):
        parser().parse_args(["--process=emu_lightning.processes.Diffusion", "--process.schedul=linear"])
    with pytest.raises(ArgumentError, match="quadratic"):
        parser().parse_args(["--process=emu_lightning.processes.Diffusion", "--process.schedule=quadratic"])
