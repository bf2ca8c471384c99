from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from emu_lightning.models import Autoencoder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(block_channels=(8, 16), norm_groups=4).eval()


@pytest.mark.parametrize("levels", [1, 3, 4])
@pytest.mark.parametrize("latent_channels", [4, 8, 16])
def test_shapes(images: torch.Tensor, levels: int, latent_channels: int) -> None:
    autoencoder = Autoencoder(latent_channels, (8,) * levels, norm_groups=4, use_mid_attention=False)
    latents = autoencoder.encode(images)
    side = 16 // autoencoder.downsampling
    assert autoencoder.downsampling == 2 ** (levels - 1)
    assert latents.shape == (3, latent_channels, side, side)
    assert autoencoder.decode(latents).shape == images.shape


def test_without_fourier_features_it_is_diffusers_own(images: torch.Tensor, autoencoder: Autoencoder) -> None:
    reference = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).eval()
    reference.load_state_dict(autoencoder.kl.state_dict())
    sample = reference.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    found, posterior = autoencoder(images, torch.Generator().manual_seed(1))
    assert torch.equal(posterior.mean, reference.encode(images).latent_dist.mean)
    assert torch.equal(found, reference.decode(sample).sample)


def test_measured_latents_are_those_of_samples(images: torch.Tensor, autoencoder: Autoencoder) -> None:
    autoencoder.measure_latents([images[:2], images[2:]])
    rng = torch.Generator().manual_seed(0)
    posterior = autoencoder.posterior(images)
    samples = torch.cat([posterior.sample(rng) for _ in range(400)])
    assert torch.allclose(autoencoder.latent_mean, samples.mean(dim=(0, 2, 3)), atol=0.01)
    assert torch.allclose(autoencoder.latent_std, samples.std(dim=(0, 2, 3)), atol=0.01)


def test_normalisation_is_undone_by_decoding(images: torch.Tensor, autoencoder: Autoencoder) -> None:
    raw = autoencoder.encode(images)
    expected = autoencoder.reconstruct(images)
    autoencoder.measure_latents([images])
    latents = autoencoder.encode(images)
    assert not torch.allclose(raw, latents)
    assert torch.allclose(autoencoder.decode(latents), expected, atol=1e-5)


def test_noise_comes_from_the_generator_alone(images: torch.Tensor, autoencoder: Autoencoder) -> None:
    first, second = (autoencoder.encode(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, autoencoder.encode(images, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, autoencoder.encode(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(
    tmp_path: Path, images: torch.Tensor, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    autoencoder = Autoencoder(16, (8, 16), 2, (0, 1), 4, use_mid_attention=False)
    autoencoder.measure_latents([images])
    autoencoder.save(tmp_path, dtype)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not loaded.training and loaded.dtype == torch.float32 and autoencoder.dtype == torch.float32
    for name, value in autoencoder.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.to(dtype).float()), name
    assert torch.equal(loaded.latent_mean, autoencoder.latent_mean)
    assert torch.equal(loaded.latent_std, autoencoder.latent_std)
    assert capfd.readouterr().err == ""  # no advice to install things


def test_half_precision_runs(tmp_path: Path, images: torch.Tensor, autoencoder: Autoencoder) -> None:
    autoencoder.save(tmp_path)
    half = Autoencoder.from_pretrained(tmp_path, torch.bfloat16)
    found = half.decode(half.encode(images.bfloat16()))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), autoencoder.reconstruct(images), atol=0.1)


def test_sizes_that_do_not_fit_are_refused(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="images of 16x15 do not fit an autoencoder of downsampling 2"):
        autoencoder.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ValueError, match=r"block_channels \[6\] are not divisible by norm_groups=4"):
        Autoencoder(block_channels=(6, 8), norm_groups=4)


def test_nothing_to_measure_is_an_error(autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="without pictures"):
        autoencoder.measure_latents([])
