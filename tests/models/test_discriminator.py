from __future__ import annotations

import pytest
import torch

from emu_lightning.models import PatchDiscriminator


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_one_patch(num_layers: int, patch: int) -> None:
    """Receptive field, measured by gradients, against PatchGAN's published sizes."""
    discriminator = PatchDiscriminator(4, num_layers, norm_groups=4)
    for (
        layer
    ) in discriminator.modules():  # GroupNorm's statistics see the whole image: judge convolutions alone
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[method-assign]
    images = torch.zeros(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == patch


def test_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    discriminator = PatchDiscriminator(8, 2, norm_groups=4)
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6)


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="channels=6 divisible by norm_groups=4"):
        PatchDiscriminator(6, 1, norm_groups=4)
