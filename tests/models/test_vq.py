from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel

from emu_lightning.data.latents import load_encoder
from emu_lightning.models import Autoencoder, VQAutoencoder, load_autoencoder, load_vq_autoencoder
from emu_lightning.models.vq import perplexity


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def autoencoder() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(codebook_size=32, code_dim=4, block_channels=(8, 16), norm_groups=4).eval()


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_shapes(images: torch.Tensor, levels: int) -> None:
    autoencoder = VQAutoencoder(7, 5, (8,) * levels, norm_groups=4, use_mid_attention=False)
    latents = autoencoder.encode(images)
    ids = autoencoder.ids(latents)
    side = 16 // autoencoder.downsampling
    assert autoencoder.downsampling == 2 ** (levels - 1)
    assert latents.shape == (3, 5, side, side)
    assert ids.shape == (3, side, side) and ids.dtype == torch.int64
    assert autoencoder.decode_ids(ids).shape == images.shape


def test_it_is_diffusers_own(images: torch.Tensor, autoencoder: VQAutoencoder) -> None:
    reference = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).eval()
    reference.load_state_dict(autoencoder.vq.state_dict())
    reconstructions, latents, codes, ids = autoencoder(images)
    directions = reference.encode(images).latents
    torch.testing.assert_close(latents, directions / directions.square().mean(1, keepdim=True).sqrt())
    quantised, _, (_, _, indices) = reference.quantize(latents)
    assert torch.equal(ids.flatten(), indices)
    torch.testing.assert_close(codes, quantised)
    torch.testing.assert_close(reconstructions, reference.decode(latents).sample)


def test_an_encoder_of_patches_sees_each_by_itself(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(32, 4, (8, 16, 16), norm_groups=4, patch_width=12)
    latents = autoencoder.encode(images)
    assert latents.shape == (3, 4, 4, 4)
    changed = images.clone()
    changed[..., 4:8, 8:12] = 0
    differs = (autoencoder.encode(changed) - latents).abs().amax((0, 1)) > 1e-3
    assert differs.nonzero().tolist() == [[1, 2]]
    patch = autoencoder.encode(images[..., 4:8, 8:12])
    torch.testing.assert_close(patch[..., 0, 0], latents[..., 1, 2])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ids_are_those_of_the_nearest_codes(autoencoder: VQAutoencoder, precision: torch.dtype) -> None:
    """Also where training computes in bfloat16: distances of near codes would drown in its rounding."""
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        found = autoencoder.ids(latents).numpy()
    codebook = autoencoder.codebook.weight.detach().double().numpy()
    for b, y, x in np.ndindex(found.shape):
        distances = ((latents[b, :, y, x].double().numpy() - codebook) ** 2).sum(1)
        assert found[b, y, x] == distances.argmin()


def test_ids_say_all_that_the_decoder_sees(images: torch.Tensor, autoencoder: VQAutoencoder) -> None:
    ids = autoencoder.ids(autoencoder.encode(images))
    assert len(ids.unique()) > 5
    torch.testing.assert_close(autoencoder.decode_ids(ids), autoencoder.reconstruct(images))
    torch.testing.assert_close(autoencoder.ids(autoencoder.codes(ids)), ids)


def test_gradient_of_the_picture_passes_the_codes_by(
    images: torch.Tensor, autoencoder: VQAutoencoder
) -> None:
    """The encoder gets, at its latents, what the decoder gives at their codes; the codes get nothing."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    seen = images.clone().requires_grad_()
    (autoencoder(seen)[0] * direction).sum().backward()
    assert autoencoder.codebook.weight.grad is None

    codes = autoencoder.codes(autoencoder.ids(autoencoder.encode(images))).detach().requires_grad_()
    (autoencoder.decode(codes) * direction).sum().backward()
    again = images.clone().requires_grad_()
    (autoencoder.encode(again) * codes.grad).sum().backward()
    torch.testing.assert_close(seen.grad, again.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(tmp_path: Path, autoencoder: VQAutoencoder, dtype: torch.dtype) -> None:
    autoencoder.usage.uniform_(0, 1, generator=torch.Generator().manual_seed(3))
    autoencoder.save(tmp_path, dtype)
    loaded = load_vq_autoencoder(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not loaded.training and loaded.dtype == torch.float32
    for name, value in autoencoder.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.to(dtype).float()), name
    assert torch.equal(loaded.usage, autoencoder.usage)


def test_a_folder_is_read_by_the_class_that_wrote_it(
    tmp_path: Path, images: torch.Tensor, autoencoder: VQAutoencoder
) -> None:
    autoencoder.save(tmp_path / "vq")
    Autoencoder(block_channels=(8, 16), norm_groups=4).save(tmp_path / "kl")
    encoder = load_encoder(tmp_path / "vq", torch.device("cpu"))
    assert torch.equal(encoder.encode(images), autoencoder.encode(images))
    assert isinstance(load_encoder(tmp_path / "kl", torch.device("cpu")), Autoencoder)
    with pytest.raises(
        ValueError, match="vq holds a network of class VQAutoencoder, where class Autoencoder is"
    ):
        load_autoencoder(str(tmp_path / "vq"))
    with pytest.raises(
        ValueError, match="kl holds a network of class Autoencoder, where class VQAutoencoder is"
    ):
        load_vq_autoencoder(str(tmp_path / "kl"))
    with pytest.raises(FileNotFoundError, match="no autoencoder in .*nothing: train one first"):
        load_vq_autoencoder(str(tmp_path / "nothing"))


def test_perplexity_counts_equally_frequent_codes() -> None:
    for used in (1, 3, 8):
        shares = torch.cat([torch.full((used,), 1 / used), torch.zeros(8 - used)])
        assert perplexity(shares) == pytest.approx(used, rel=1e-5)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert perplexity(shares) == pytest.approx(2**1.5, rel=1e-5)  # 1.5 bits


def test_codes_used_less_than_a_hundredth_of_the_mean_are_unused(autoencoder: VQAutoencoder) -> None:
    assert autoencoder.unused().all()
    autoencoder.usage.fill_(1 / 32)
    autoencoder.usage[3], autoencoder.usage[5], autoencoder.usage[7] = 0, 0.009 / 32, 0.011 / 32
    assert autoencoder.unused().nonzero().flatten().tolist() == [3, 5]


def test_sizes_that_do_not_fit_are_refused(autoencoder: VQAutoencoder) -> None:
    with pytest.raises(ValueError, match="images of 16x15 do not fit an autoencoder of downsampling 2"):
        autoencoder.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ValueError, match=r"block_channels \[6\] are not divisible by norm_groups=4"):
        VQAutoencoder(block_channels=(6, 8), norm_groups=4)
