"""Training and sampling of the diffusion module, on networks whose output is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Callback
from torch import Tensor, nn

from emu_lightning.data.batch import Batch
from emu_lightning.models import SmallTextEncoder, Text, TextEncoder
from emu_lightning.modules import DiffusionModule
from emu_lightning.processes import Diffusion, RectifiedFlow
from emu_lightning.processes.seeding import generator_for, generators_for
from tests.tiny import TinyData, make_batch, make_trainer, tiny_autoencoder, tiny_generator, tiny_unet


class Scaling(nn.Module):
    """prediction = scale * x_t + the text's number; remembers what it was given."""

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.config = SimpleNamespace(in_channels=3)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, text: Text, size: Tensor) -> Tensor:
        self.seen.append((x_t, t, size))
        return self.scale * x_t + text.pooled[:, :, None, None]


class Length(TextEncoder):
    """A text's number is its length over 100."""

    sequence_dim = pooled_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.01))
        self.seen: list[list[str]] = []

    def forward(self, texts: list[str]) -> Text:
        self.seen.append(texts)
        pooled = self.weight * torch.tensor([[float(len(text))] for text in texts])
        return Text(pooled[:, None], torch.ones(len(texts), 1, dtype=torch.bool), pooled)


class Recorded:
    """Mixed into a process: keeps what training drew."""

    def sample_t(self, *args: Any, **kwargs: Any) -> Tensor:
        self.t = super().sample_t(*args, **kwargs)
        return self.t

    def noise_like(self, x_0: Tensor, *args: Any) -> Tensor:
        self.x_0, self.noise = x_0, super().noise_like(x_0, *args)
        return self.noise


class RecordedDiffusion(Recorded, Diffusion):
    pass


class RecordedFlow(Recorded, RectifiedFlow):
    pass


def known_module(**arguments: Any) -> DiffusionModule:
    defaults = {"denoiser": Scaling(), "text_encoder": Length(), "process": Diffusion(), "image_size": 8}
    return DiffusionModule(**{**defaults, **arguments})


def rng(position: int = 0) -> torch.Generator:
    return generator_for(0, position)


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["noise", "velocity", "x_0"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_weighted_error_of_the_prediction(prediction: str, gamma: float | None) -> None:
    """Against diffusers' forward process and the weights of Hang et al. written out."""
    process = RecordedDiffusion(prediction=prediction, min_snr_gamma=gamma, noise_offset=0.1)  # type: ignore[arg-type]
    module = known_module(process=process, text_dropout=0.0)
    batch = make_batch(0)
    loss = module.loss(batch, rng())

    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    timesteps = (process.t * 1000).round().long()
    x_t = scheduler.add_noise(batch.images, process.noise, timesteps)
    targets = {
        "noise": process.noise,
        "x_0": batch.images,
        "velocity": scheduler.get_velocity(batch.images, process.noise, timesteps),
    }
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weight_of_x_0 = torch.ones(4) if gamma is None else snr.clamp(max=gamma)
    per_x_0 = {"noise": snr, "x_0": torch.ones(4), "velocity": snr + 1}[prediction]
    weight = torch.ones(4) if gamma is None else weight_of_x_0 / per_x_0
    text = torch.tensor([len(text) / 100 for text in batch.texts])
    error = (0.3 * x_t + text[:, None, None, None] - targets[prediction]).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx((weight * error).mean().item(), rel=1e-4)
    (given, t, size), *_ = module.denoiser.seen
    assert torch.allclose(given, x_t, atol=1e-5) and torch.equal(t, process.t)
    assert size.tolist() == [[8, 8, 0, 0, 8, 8]] * 4


def test_the_loss_of_rectified_flow_is_the_error_of_the_straight_line() -> None:
    process = RecordedFlow(noise_offset=0.1)
    module = known_module(process=process, text_dropout=1.0)
    images = make_batch(0).images
    loss = module.loss(make_batch(0), rng())
    t = process.t[:, None, None, None]
    x_t = (1 - t) * images + t * process.noise
    expected = (0.3 * x_t - (process.noise - images)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_offset_noise_shifts_whole_channels() -> None:
    process = RecordedDiffusion(noise_offset=0.5)
    known_module(process=process).loss(make_batch(0, size=500), rng())
    means = process.noise.mean((2, 3))  # variance of the mean over 64 pixels, and of the offset
    assert means.var().item() == pytest.approx(1 / 64 + 0.5**2, rel=0.15)


def test_the_loss_is_a_function_of_weights_seed_and_position() -> None:
    module = tiny_generator()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = module.loss(make_batch(0), rng(40)).item()
    torch.rand(3)
    assert module.loss(make_batch(0), rng(40)).item() == first
    assert module.loss(make_batch(0), rng(44)).item() != first
    assert module.loss(make_batch(0), generator_for(1, 40)).item() != first
    torch.set_rng_state(state)
    module.loss(make_batch(0), rng(40))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("in_pixels", [True, False])
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(in_pixels: bool) -> None:
    """So that processes and accumulated batches may share a batch: a sample's noise is its own."""
    module = tiny_generator(in_pixels=in_pixels, process=Diffusion(noise_offset=0.1), text_dropout=0.5)
    batch = make_batch(8, size=4)

    def part(start: int, stop: int) -> Batch:
        names = ("images", "texts", "original_size", "crop", "target_size", "uids")
        return replace(batch, position=8 + start, **{n: getattr(batch, n)[start:stop] for n in names})

    losses = [
        module.loss(part(*piece), generators_for(5, range(8 + piece[0], 8 + piece[1])))
        for piece in ((0, 4), (0, 2), (2, 4))
    ]
    assert losses[0].item() == pytest.approx((losses[1] + losses[2]).item() / 2, rel=1e-6)


def test_training_draws_by_seed_and_position(tmp_path: Path) -> None:
    """What the trainer minimises is `loss` with the generators of the samples' positions."""
    losses = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(outputs["loss"].item())

    module = tiny_generator(seed=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    module._seed = 17
    make_trainer(tmp_path, max_steps=3, callbacks=[Keep()]).fit(module, TinyData())
    module.train()
    expected = [module.loss(make_batch(p), generators_for(17, range(p, p + 4))).item() for p in (0, 4, 8)]
    assert losses == expected and len(set(expected)) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_the_stated_rate(dropout: float) -> None:
    num = 4000
    texts = [f"caption {index}" for index in range(num)]
    module = known_module(text_dropout=dropout)
    module.loss(make_batch(0, size=num, side=1, texts=texts), rng())
    (seen,) = module.text_encoder.seen
    dropped = sum(text == "" for text in seen)
    assert abs(dropped - dropout * num) <= 5 * (num * dropout * (1 - dropout)) ** 0.5
    assert all(text in ("", own) for text, own in zip(seen, texts, strict=True))


def test_images_are_encoded_by_the_frozen_autoencoder() -> None:
    autoencoder, process = tiny_autoencoder(), RecordedDiffusion()
    module = known_module(autoencoder=autoencoder, process=process, denoiser=tiny_unet(4))
    module.text_encoder = SmallTextEncoder(dim=8, num_layers=1, num_heads=2, embedding_dim=2)
    module.train()
    assert not module.autoencoder.training and module.denoiser.training
    batch = make_batch(0)
    module.loss(batch, rng()).backward()
    assert all(p.grad is None and not p.requires_grad for p in module.autoencoder.parameters())
    posterior = autoencoder.posterior(batch.images)  # the latents are a sample of it, normalised
    deviation = process.x_0 * autoencoder.latent_std.view(1, -1, 1, 1) - (
        posterior.mean - autoencoder.latent_mean.view(1, -1, 1, 1)
    )
    ratio = (deviation / posterior.std).detach()
    assert ratio.abs().max() < 6 and ratio.std().item() == pytest.approx(1, abs=0.15)


def test_cached_latents_are_taken_as_they_are() -> None:
    process = RecordedDiffusion()
    module = known_module(autoencoder=tiny_autoencoder(), process=process)
    batch = make_batch(0)
    batch.latents, batch.images = batch.images, None
    module.loss(batch, rng())
    assert process.x_0 is batch.latents


def test_training_judges_the_weights_and_validation_their_average() -> None:
    process = RecordedFlow()
    module = known_module(process=process, text_dropout=1.0)
    with torch.no_grad():
        module.average.model.scale.fill_(0.9)
    for mode, scale in ((True, 0.3), (False, 0.9)):
        module.train(mode)
        loss = module.loss(make_batch(0), rng())
        x_t, target = process.corrupt(process.x_0, process.noise, process.t), process.noise - process.x_0
        assert loss.item() == pytest.approx((scale * x_t - target).square().mean().item(), rel=1e-5)


# --- the optimizer and the average --------------------------------------------------------------------------


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """First parts of the names of all weights that moved."""
    state = module.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], state[name])}


@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_the_optimizer_moves_denoiser_and_text_encoder_only(tmp_path: Path, train_text_encoder: bool) -> None:
    module = tiny_generator(in_pixels=False, train_text_encoder=train_text_encoder, ema_decay=None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(tmp_path, max_steps=2).fit(module, TinyData())
    expected = {"denoiser", "text_encoder"} if train_text_encoder else {"denoiser"}
    assert changed(before, module) == expected
    after = module.denoiser.state_dict(prefix="denoiser.")
    assert not any(torch.equal(before[name], after[name]) for name in after)  # every weight of it


class KeepWeights(Callback):
    """The denoiser's one weight and its average, after every batch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.averages: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(pl_module.generator.denoiser.scale.item())
        self.averages.append(pl_module.generator.average.model.scale.item())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_average_follows_every_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    keep = KeepWeights()
    module = known_module(ema_decay=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    make_trainer(tmp_path, max_steps=5, accumulate_grad_batches=accumulate, callbacks=[keep]).fit(
        module, TinyData()
    )
    assert len(keep.weights) == 5 * accumulate
    expected = 0.3
    for step in range(5):
        decay = min(0.5, (1 + step) / (10 + step))
        last = accumulate * (step + 1) - 1
        assert keep.averages[accumulate * step : last] == [pytest.approx(expected)] * (accumulate - 1)
        expected = decay * expected + (1 - decay) * keep.weights[last]
        assert keep.averages[last] == pytest.approx(expected)
    assert len(set(keep.weights)) == (5 if accumulate == 1 else 6)
    assert int(module.average.num_updates) == 5


def test_the_schedule_is_stepped_once_an_optimizer_step(tmp_path: Path) -> None:
    module = known_module(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    trainer = make_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(module, TinyData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tiny_generator(text_dropout=0.0)
    before = sum(module.loss(make_batch(0), rng(p)).item() for p in range(20))
    make_trainer(tmp_path, max_steps=40).fit(module, TinyData())
    module.train()
    assert sum(module.loss(make_batch(0), rng(p)).item() for p in range(20)) < 0.9 * before


# --- sampling -----------------------------------------------------------------------------------------------

PROMPTS = ["a red ball in the snow", "a star", "a purple box on a beach on the left"]


@pytest.fixture(params=[True, False], ids=["pixels", "latents"])
def trained(request: pytest.FixtureRequest) -> DiffusionModule:
    """A generator of which no weight is zero and whose average differs from its weights."""
    module = tiny_generator(in_pixels=request.param)
    torch.manual_seed(5)
    with torch.no_grad():
        for network in (module.denoiser, module.average.model, module.text_encoder):
            for weight in network.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return module


def test_a_picture_is_a_function_of_prompt_and_seed_not_of_the_batch(trained: DiffusionModule) -> None:
    together = trained.generate(PROMPTS, [7, 8, 9])
    assert together.shape == (3, 3, 8, 8) and together.dtype == torch.float32
    assert together.abs().max() <= 1 and together.std() > 0.1
    for index, prompt in enumerate(PROMPTS):
        alone = trained.generate([prompt], iter([7 + index]))
        assert torch.allclose(alone[0], together[index], atol=1e-4)
    backwards = trained.generate(PROMPTS[::-1], [9, 8, 7]).flip(0)
    assert torch.allclose(backwards, together, atol=1e-4)
    assert not torch.allclose(trained.generate(PROMPTS, [8, 8, 9])[0], together[0], atol=1e-2)
    other = trained.generate(["a star", *PROMPTS[1:]], [7, 8, 9])
    assert not torch.allclose(other[0], together[0], atol=1e-2)
    assert torch.allclose(other[1:], together[1:], atol=1e-4)


def test_sampling_leaves_everything_as_it_was(trained: DiffusionModule) -> None:
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for mode in (True, False):
        trained.train(mode)
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        images = trained.generate(PROMPTS[:1], [0])
        assert not images.requires_grad
        assert trained.training == trained.denoiser.training == mode
        assert trained.autoencoder is None or not trained.autoencoder.training
        assert changed(before, trained) == set()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_training_mode_comes_back_after_an_error(num_steps: int) -> None:
    module = tiny_generator().train()
    with pytest.raises(ValueError, match=f"num_steps={num_steps}: give at least 1"):
        module.generate(PROMPTS[:1], [0], num_steps=num_steps)
    assert module.training


def test_sampling_uses_the_averaged_weights(trained: DiffusionModule) -> None:
    expected = trained.generate(PROMPTS[:1], [0])
    with torch.no_grad():
        for weight in trained.denoiser.parameters():
            weight.zero_()
    assert torch.equal(trained.generate(PROMPTS[:1], [0]), expected)
    with torch.no_grad():
        for weight in trained.average.model.parameters():
            weight.zero_()
    assert not torch.allclose(trained.generate(PROMPTS[:1], [0]), expected, atol=1e-2)


def test_without_an_average_sampling_uses_the_weights() -> None:
    module = tiny_generator(ema_decay=None)
    expected = module.generate(PROMPTS[:1], [0])
    with torch.no_grad():
        for weight in module.denoiser.parameters():
            weight.zero_()
    assert not torch.allclose(module.generate(PROMPTS[:1], [0]), expected, atol=1e-2)


def test_guidance_and_steps_are_those_asked_for() -> None:
    module = known_module(num_steps=4, guidance_scale=2.0, ema_decay=None)
    for options, num_calls, width in [
        ({}, 4, 4),  # two prompts, each also without its text
        ({"guidance_scale": 1.0}, 4, 2),
        ({"num_steps": 2}, 2, 4),
    ]:
        module.denoiser.seen.clear()
        module.generate(["a", "bb"], [0, 1], **options)
        assert [len(x_t) for x_t, *_ in module.denoiser.seen] == [width] * num_calls
        assert torch.equal(module.denoiser.seen[0][2], torch.tensor([[8.0, 8, 0, 0, 8, 8]]))


def test_guidance_moves_away_from_the_empty_prompt() -> None:
    """The denoiser predicts x_0 = the text's length over 100, whatever the noise: guided, it is scaled."""
    module = known_module(
        denoiser=Scaling(0.0), process=Diffusion(prediction="x_0"), num_steps=3, ema_decay=None
    )
    for scale in (1.0, 2.0, 3.0):
        images = module.generate(["x" * 10, "x" * 20], [0, 1], guidance_scale=scale)
        for image, expected in zip(images, (0.1 * scale, 0.2 * scale), strict=True):
            assert torch.allclose(image, torch.full_like(image, expected), atol=1e-3)


def test_predicting_makes_pictures_of_the_batch() -> None:
    module = tiny_generator()
    images = module.predict_step(make_batch(12), 0)
    assert torch.allclose(images, module.generate(make_batch(12).texts, range(12, 16)), atol=1e-5)


def test_a_stage_starts_from_the_weights_of_the_one_before_with_settings_of_its_own(tmp_path):
    before = tiny_generator(seed=1)
    before.save_pretrained(tmp_path / "before")
    after = tiny_generator(
        seed=2, init_from=str(tmp_path / "before"), image_size=16, process=Diffusion(noise_offset=0.02)
    )
    state = after.sampling_state()
    assert all(torch.equal(value, state[name]) for name, value in before.sampling_state().items())
    assert after.average is not None and after.average.num_updates == 0
    assert after.image_size == 16 and after.process.noise_offset == 0.02
    assert "init_from" not in after.describe()["init_args"]  # its own folder has its own weights


def test_a_stage_of_other_networks_cannot_start_from_it(tmp_path):
    tiny_generator().save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match="before do not fit their description"):
        tiny_generator(init_from=str(tmp_path / "before"), denoiser=tiny_unet(3, block_channels=(8, 24)))
    with pytest.raises(FileNotFoundError, match="no generator at"):
        tiny_generator(init_from=str(tmp_path / "nowhere"))
