from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from emu_lightning.losses import perceptual_distance
from emu_lightning.models import PooledFeatures, RandomFeatures, TimmFeatures


def test_random_features_are_fixed_by_their_seed() -> None:
    images = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    first = RandomFeatures((4, 8), seed=3)(images)
    torch.manual_seed(1)
    second, other = RandomFeatures((4, 8), seed=3)(images), RandomFeatures((4, 8), seed=4)(images)
    assert [f.shape for f in first] == [(2, 4, 16, 16), (2, 8, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_random_features_keep_their_scale() -> None:
    maps = RandomFeatures((64, 64, 64, 64))(torch.randn(2, 3, 32, 32))
    energies = [features.square().mean().item() for features in maps]
    assert all(0.4 < energy < 2.5 for energy in energies), energies


def test_a_frozen_network_has_neither_state_nor_parameters_but_gradients_of_images() -> None:
    network = RandomFeatures((4,))
    assert not network.state_dict() and not list(network.parameters()) and not network.train().training
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    network(images)[0].sum().backward()
    assert (images.grad != 0).any()
    assert network.double()(images.double())[0].dtype == torch.float64  # still follows `.to`


def test_distance_grows_with_blur() -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    network = RandomFeatures()
    blurred = [functional.avg_pool2d(images, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 5, 9)]
    distances = [perceptual_distance(network(x), network(images)).mean().item() for x in blurred]
    assert distances[0] == 0 and distances == sorted(distances)


def test_pooled_features_take_bytes() -> None:
    network = RandomFeatures((4, 8))
    pooled = PooledFeatures(network)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features = pooled(images)
    assert features.shape == (5, pooled.num_features) == (5, 12)
    assert torch.allclose(features[:, :4], network(images / 127.5 - 1)[0].mean(dim=(2, 3)), atol=1e-6)


def test_timm_features_come_from_the_file(tmp_path: Path) -> None:
    reference = timm.create_model("test_resnet", num_classes=1000)
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    network = TimmFeatures("test_resnet", str(tmp_path / "weights.safetensors"))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    maps = network(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = reference.eval().forward_features(inputs)
    assert tuple(f.shape[1] for f in maps) == network.channels
    assert torch.allclose(maps[-1], expected, atol=1e-4)
    assert network.name == "test_resnet" and not network.state_dict()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights of vgg16 not found at .*gone.pth"):
        TimmFeatures("vgg16", str(tmp_path / "gone.pth"))
