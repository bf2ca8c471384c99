"""Super-resolution: what the network is given, in training and in sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from emu_lightning.models import PixelUNet, Text
from emu_lightning.modules import DiffusionModule, SuperResolutionModule, load_upsampler
from emu_lightning.processes import Diffusion
from emu_lightning.processes.seeding import generators_for
from tests.tiny import TinyData, make_batch, make_trainer, tiny_upsampler

PROMPTS, SEEDS = ["a red ball in the snow", "a star"], [3, 4]


class Recording(nn.Module):
    """A denoiser that says 0 and keeps what it was given."""

    side_multiple = 2

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=3, use_low_resolution=True)
        self.scale = nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, text: Text, *, low_resolution: Tensor, level: Tensor) -> Tensor:
        self.seen.append({"x_t": x_t, "t": t, "low": low_resolution, "level": level})
        return self.scale * x_t


def recorded(**arguments: Any) -> tuple[SuperResolutionModule, list[dict[str, Tensor]]]:
    denoiser = Recording()
    return tiny_upsampler(denoiser=denoiser, ema_decay=None, **arguments), denoiser.seen


def rng(num: int, first: int = 0) -> list[torch.Generator]:
    return generators_for(0, range(first, first + num))


# --- noise-conditioning augmentation ------------------------------------------------------------------------


def cosine_alpha(level: Tensor) -> Tensor:
    """sqrt of Nichol & Dhariwal's cumulative product (2021, eq. 17), at the timestep of a level."""
    f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    betas = np.minimum(1 - np.array(f[1:]) / np.array(f[:-1]), 0.999)
    alphas = np.sqrt(np.cumprod(1 - betas))
    return torch.tensor(alphas)[(1000 * level).round().long().clamp(0, 999)].float()


def test_training_corrupts_the_small_pictures_at_a_level_that_it_tells() -> None:
    """alpha_s * small + sigma_s * noise, s ~ U(0, max_level), noise of its own."""
    module, seen = recorded(max_level=0.6)
    batch = make_batch(0, size=256, side=16)
    module.loss(batch, rng(256))
    (given,) = seen
    assert given["level"].max() <= 0.6
    assert kstest(given["level"].numpy(), "uniform", (0, 0.6), method="asymp").pvalue > 0.01
    small = nn.functional.interpolate(batch.images, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    alpha = cosine_alpha(given["level"])[:, None, None, None]
    noise = ((given["low"] - alpha * small) / (1 - alpha**2).sqrt())[given["level"] > 0.05]
    assert kstest(noise.flatten().numpy()[::7], "norm", method="asymp").pvalue > 0.01
    alpha_t = cosine_alpha(given["t"])[:, None, None, None]
    of_x_t = ((given["x_t"] - alpha_t * batch.images) / (1 - alpha_t**2).sqrt())[given["level"] > 0.05]
    together = torch.stack([noise.flatten(), of_x_t[:, :, ::2, ::2].flatten()])
    assert torch.corrcoef(together)[0, 1].abs() < 0.02  # not the noise that is to be predicted


def test_the_level_is_not_the_time_of_the_diffusion() -> None:
    module, seen = recorded()
    module.loss(make_batch(0, size=256, side=16), rng(256))
    assert torch.corrcoef(torch.stack([seen[0]["level"], seen[0]["t"]]))[0, 1].abs() < 0.2


def test_the_offset_of_training_stays_off_the_small_pictures() -> None:
    batch = make_batch(0, size=4, side=16)
    module, seen = recorded()
    module.loss(batch, rng(4))
    module, others = recorded(process=Diffusion(noise_offset=3.0))
    module.loss(batch, rng(4))
    assert torch.equal(seen[0]["low"], others[0]["low"]) and torch.equal(seen[0]["level"], others[0]["level"])


@pytest.mark.parametrize("asked", [None, 0.0, 0.7])
def test_sampling_augments_at_the_level_asked_for_once(asked: float | None) -> None:
    module, seen = recorded(augmentation_level=0.25, num_steps=3)
    images = make_batch(0, size=2).images
    module.upsample(images, PROMPTS, SEEDS, augmentation_level=asked)
    level = 0.25 if asked is None else asked
    assert len(seen) == 3
    for given in seen:
        assert given["level"].tolist() == pytest.approx([level] * 4)  # guidance doubles the batch
        assert torch.equal(given["low"], seen[0]["low"])
        assert torch.equal(given["low"][:2], given["low"][2:])
    alpha = cosine_alpha(torch.tensor(level)).item()
    noise = seen[0]["low"][:2] - alpha * images
    assert noise.std().item() == pytest.approx((1 - alpha**2) ** 0.5, rel=0.15)


# --- what the network is left to say ------------------------------------------------------------------------


class Saying(Recording):
    """A denoiser that says one number everywhere."""

    def __init__(self, said: float) -> None:
        super().__init__()
        self.said = said

    def forward(self, x_t: Tensor, *args: Any, **arguments: Any) -> Tensor:
        return torch.full_like(x_t, self.said)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "x_0"])
@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
def test_with_a_residual_the_network_says_what_no_linear_estimate_can(prediction: Any, time: float) -> None:
    """Of images d away from their enlarged small ones, the output that makes the prediction right has
    variance 1 and nothing to do with x_t: what x_t and the small images say together is said already."""
    rng = torch.Generator().manual_seed(0)
    small = torch.rand(64, 3, 4, 4, generator=rng) * 2 - 1
    mean = nn.functional.interpolate(small, (8, 8), mode="bicubic")
    x_0 = mean + 0.3 * torch.randn(mean.shape, generator=rng)
    noise, t = torch.randn(mean.shape, generator=rng), torch.full((64,), time)
    process = Diffusion(prediction=prediction)
    x_t = process.corrupt(x_0, noise, t)
    said = []
    for number in (0.0, 1.0):
        module = tiny_upsampler(denoiser=Saying(number), ema_decay=None, process=process, residual_std=0.3)
        text, level = Text(small, small, small), torch.zeros(64)  # not read
        said.append(module._predict(module.denoiser, x_t, t, text, small, level))
    nothing, one = said  # the prediction is affine in the output
    right = ((process.target(x_0, noise, t) - nothing) / (one - nothing)).flatten()
    residual = (x_t - cosine_alpha(t)[:, None, None, None] * mean).flatten()
    assert right.std().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(torch.stack([right, residual]))[0, 1].abs() < 0.03


def test_with_a_residual_a_silent_network_enlarges() -> None:
    module = tiny_upsampler(denoiser=Saying(0), ema_decay=None, residual_std=0.01, augmentation_level=0.0)
    images = make_batch(0, size=2).images * 0.5
    made = module.upsample(images, PROMPTS, SEEDS)
    enlarged = nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
    assert (made - enlarged).abs().mean() < 0.03


# --- crops --------------------------------------------------------------------------------------------------


def test_crops_are_the_same_place_of_both_pictures_and_every_place_comes() -> None:
    module = tiny_upsampler(crop_size=4)
    images = make_batch(0, size=1, side=8).images.expand(120, -1, -1, -1)
    small = module._reduce(images)
    large_crops, small_crops = module._crop(images, small, rng(120))
    assert large_crops.shape[-2:] == (4, 4) and small_crops.shape[-2:] == (2, 2)
    places = set()
    for large, little in zip(large_crops, small_crops, strict=True):
        (place,) = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(large, images[0, :, 2 * top : 2 * top + 4, 2 * left : 2 * left + 4])
        ]
        top, left = place
        assert torch.equal(little, small[0, :, top : top + 2, left : left + 2])
        places.add(place)
    assert len(places) == 9


def test_training_learns_from_crops() -> None:
    module, seen = recorded(crop_size=4)
    module.loss(make_batch(0, side=16), rng(4))
    assert seen[0]["x_t"].shape == (4, 3, 4, 4) and seen[0]["low"].shape == (4, 3, 2, 2)


def test_made_small_without_aliasing() -> None:
    """A chessboard of single pixels becomes grey."""
    board = torch.ones(1, 3, 16, 16)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    small = tiny_upsampler(factor=4)._reduce(board)
    assert small.shape == (1, 3, 4, 4) and small.abs().max() < 0.05


# --- one sample, one picture --------------------------------------------------------------------------------


def test_the_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    module, batch = tiny_upsampler(crop_size=8, text_dropout=0.5), make_batch(0, side=16)
    whole = module.loss(batch, rng(4))
    halves = []
    for first in (0, 2):
        part = slice(first, first + 2)
        half = replace(batch, images=batch.images[part], texts=batch.texts[part])
        halves.append(module.loss(half, rng(2, first)))
    assert_close(whole, torch.stack(halves).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SuperResolutionModule:
    module = tiny_upsampler(crop_size=4)
    make_trainer(tmp_path_factory.mktemp("trained"), max_steps=3).fit(module, TinyData())
    return module.eval()


def test_a_picture_is_a_function_of_image_prompt_and_seed(trained: SuperResolutionModule) -> None:
    images = make_batch(0, size=2).images
    together = trained.upsample(images, PROMPTS, SEEDS)
    assert together.shape == (2, 3, 16, 16) and together.abs().max() <= 1
    alone = trained.upsample(images[1:], PROMPTS[1:], SEEDS[1:])
    assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)
    for changed in (
        trained.upsample(images[1:], PROMPTS[:1], SEEDS[1:]),
        trained.upsample(images[1:], PROMPTS[1:], SEEDS[:1]),
        trained.upsample(images[:1], PROMPTS[1:], SEEDS[1:]),
        trained.upsample(images[1:], PROMPTS[1:], SEEDS[1:], guidance_scale=1.0),
        trained.upsample(images[1:], PROMPTS[1:], SEEDS[1:], num_steps=5),
        trained.upsample(images[1:], PROMPTS[1:], SEEDS[1:], negative_prompt="blue"),
        trained.upsample(images[1:], PROMPTS[1:], SEEDS[1:], augmentation_level=0.9),
    ):
        assert (changed[0] - together[1]).abs().max() > 1e-5


def test_any_size_may_be_asked_for_that_the_network_can_make(trained: SuperResolutionModule) -> None:
    images = make_batch(0, size=2).images[:, :, :, :6]
    assert trained.upsample(images, PROMPTS, SEEDS).shape == (2, 3, 16, 12)
    assert trained.upsample(images, PROMPTS, SEEDS, size=(20, 14)).shape == (2, 3, 20, 14)
    assert trained.low_size is None and trained.side_multiple == 2
    with pytest.raises(ValueError, match="pictures of 17x14: the sides must be multiples of 2"):
        trained.upsample(images, PROMPTS, SEEDS, size=(17, 14))
    assert not trained.training


def test_a_folder_gives_the_same_stage(trained: SuperResolutionModule, tmp_path: Path) -> None:
    images = make_batch(0, size=2).images
    folder = trained.save_pretrained(tmp_path / "stage")
    loaded = load_upsampler(folder)
    assert torch.equal(loaded.upsample(images, PROMPTS, SEEDS), trained.upsample(images, PROMPTS, SEEDS))
    assert loaded.describe() == trained.describe()
    swept = load_upsampler(folder, {"augmentation_level": 0.9})  # the sweep of Imagen's section 2.4
    expected = trained.upsample(images, PROMPTS, SEEDS, augmentation_level=0.9)
    assert torch.equal(swept.upsample(images, PROMPTS, SEEDS), expected)


class From(TinyData):
    """Goes on where the trainer is."""

    def train_dataloader(self) -> DataLoader:
        done = self.trainer.global_step
        return DataLoader([make_batch(4 * step, side=16) for step in range(done, 6)], batch_size=None)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, first, second = (tiny_upsampler(crop_size=8) for _ in range(3))
    make_trainer(tmp_path, max_steps=4).fit(whole, From())
    stopped = make_trainer(tmp_path, max_steps=2)
    stopped.fit(first, From())
    stopped.save_checkpoint(tmp_path / "at_2.ckpt")
    make_trainer(tmp_path, max_steps=4).fit(second, From(), ckpt_path=tmp_path / "at_2.ckpt")
    resumed = second.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed[name], weight), name
    assert not torch.equal(first.denoiser.text_norm.weight, whole.denoiser.text_norm.weight)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"denoiser": PixelUNet()}, "needs a denoiser with use_low_resolution: true"),
        ({"image_size": 15}, "image_size=15 is not a multiple of factor=2"),
        ({"crop_size": 5}, "crop_size=5 is not a multiple of factor=2"),
        ({"max_level": 1.5}, r"max_level=1.5 is not in \[0, 1\]"),
        ({"augmentation_level": -0.1}, r"augmentation_level=-0.1 is not in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_upsampler(**arguments)


def test_data_that_it_cannot_learn_from_is_named() -> None:
    module, batch = tiny_upsampler(crop_size=8), make_batch(0, side=6)
    with pytest.raises(ValueError, match="images of 6x6 are smaller than crop_size=8"):
        module.loss(batch, rng(4))
    with pytest.raises(ValueError, match="sides must be multiples of factor=4"):
        tiny_upsampler(factor=4).loss(batch, rng(4))
    latents = replace(batch, images=None, latents=batch.images)
    with pytest.raises(ValueError, match="learns from images, but the data gives latents"):
        module.loss(latents, rng(4))


def test_a_stage_s_network_in_a_base_is_named() -> None:
    denoiser = tiny_upsampler().denoiser
    base = DiffusionModule(denoiser, tiny_upsampler().text_encoder, Diffusion(), image_size=8)
    with pytest.raises(ValueError, match="belongs into a SuperResolutionModule"):
        base.loss(make_batch(0), rng(4))
