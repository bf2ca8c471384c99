from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch.distributions import Normal, kl_divergence

from emu_lightning.losses import (
    adaptive_weight,
    codebook_loss,
    commitment_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    perceptual_distance,
    reconstruction_loss,
)


def test_reconstruction_is_a_mean_over_values() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.allclose(reconstruction_loss(x, y, "l1"), (x - y).abs().sum() / 96)
    assert torch.allclose(reconstruction_loss(x, y, "l2"), (x - y).square().sum() / 96)


def test_kl_is_that_of_torch_distributions_per_colour_value() -> None:
    mean, logvar = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    expected = (
        kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)).mean() / 192
    )
    assert torch.allclose(kl_loss(mean, logvar, num_values=192), expected)


def test_objective_has_the_relative_weights_of_latent_diffusion() -> None:
    """LDM: sum of |x - y| over values and batch, plus weight times sum of KL, both over the batch size."""
    x, y, mean, logvar = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), *torch.randn(2, 2, 4, 2, 2)
    ldm = (x - y).abs().sum() / 2 + 0.1 * kl_divergence(
        Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)
    ).sum() / 2
    ours = reconstruction_loss(x, y) + 0.1 * kl_loss(mean, logvar, num_values=192)
    assert torch.allclose(ours * 192, ldm)


def test_codebook_terms_are_the_formula_each_on_its_own_side() -> None:
    """van den Oord et al. 2017, eq. 3: |sg[z] - e|^2 moves e alone, beta |z - sg[e]|^2 moves z alone."""
    z, e = (torch.randn(2, 4, 3, 3).requires_grad_() for _ in range(2))
    distance = (z - e).detach().square().mean()
    towards = 2 * (e - z).detach() / z.numel()  # d mean |z - e|^2 / d e, by hand
    loss = codebook_loss(z, e)
    assert torch.allclose(loss, distance)
    by_z, by_e = torch.autograd.grad(loss, (z, e), allow_unused=True)
    assert by_z is None and torch.allclose(by_e, towards)
    loss = commitment_loss(z, e)
    assert torch.allclose(loss, distance)
    by_z, by_e = torch.autograd.grad(loss, (z, e), allow_unused=True)
    assert by_e is None and torch.allclose(by_z, -towards)


def test_codebook_terms_are_diffusers_own_where_it_follows_the_paper() -> None:
    """`VectorQuantizer` does with legacy=False only."""
    quantizer = VectorQuantizer(16, 4, beta=0.25, legacy=False)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(2, 4, 3, 3).requires_grad_()
    _, expected, (_, _, ids) = quantizer(z)
    e = quantizer.embedding(ids.view(2, 3, 3)).movedim(-1, 1)
    found = codebook_loss(z, e) + 0.25 * commitment_loss(z, e)
    inputs = (z, quantizer.embedding.weight)
    assert torch.allclose(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(ours, theirs)


def test_hinge_losses_are_the_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25, 1.0])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.25 + 2) / 3)
    )
    assert hinge_generator_loss(fake) == pytest.approx(1.75 / 3)


def test_adaptive_weight_is_the_ratio_of_norms() -> None:
    towards_data, towards_real = torch.randn(4, 3), torch.randn(4, 3)
    expected = (towards_data.square().sum() / towards_real.square().sum()).sqrt()
    assert torch.allclose(adaptive_weight(towards_data, towards_real), expected, rtol=1e-3)


def test_adaptive_weight_is_clamped() -> None:
    gradient = torch.ones(1)
    assert adaptive_weight(1e9 * gradient, 0 * gradient) == 1e4
    assert adaptive_weight(0 * gradient, gradient) == 0


def test_perceptual_distance_is_that_of_directions() -> None:
    x, y = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).mean(dim=(1, 2))
    assert torch.allclose(perceptual_distance([x], [y]), 2 - 2 * cosine, atol=1e-6)
    assert torch.allclose(perceptual_distance([x], [5 * x]), torch.zeros(2), atol=1e-6)
    assert torch.allclose(perceptual_distance([x], [-x]), torch.full((2,), 4.0), atol=1e-5)
    assert torch.allclose(perceptual_distance([x, x], [y, x]), 1 - cosine, atol=1e-6)
