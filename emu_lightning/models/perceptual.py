"""Frozen feature networks: what perceptual losses and Frechet distances compare."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class FeatureNetwork(nn.Module, ABC):
    """Images to a list of feature maps, fine to coarse. Subclasses are frozen: see `freeze`.

    Attributes:
        name: goes into every metric that these features make, so that no number passes for another's.
        channels: width of each feature map.
    """

    name: str
    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, channels[i], h_i, w_i) of images (B, 3, H, W) in [-1, 1], differentiable in them."""

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode, whatever its owner does."""
        return super().train(False)


def freeze(module: nn.Module) -> None:
    """Turns all parameters and buffers into buffers that no checkpoint holds and no optimizer sees.

    They still follow `.to(device)`. A frozen network is a constant: its file, or its seed, is its only
    source.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach(), persistent=False)
        child._non_persistent_buffers_set.update(child._buffers)
    module.eval()


class RandomFeatures(FeatureNetwork):
    """A pyramid of random convolutions, fixed by its seed: the default that needs no download.

    This is *not* LPIPS: nobody learnt it from pictures or people. Random convolutions still answer to edges
    and textures at several scales, which per-pixel losses do not. Use `TimmFeatures` with real weights where
    you have them.

    Args:
        channels: width per scale; each scale but the first halves the side.
        seed: of the weights. A loss and the metric that judges it should differ in it.
    """

    name = "random"

    def __init__(self, channels: Sequence[int] = (16, 32, 64), seed: int = 0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        rng = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for n, (inputs, outputs) in enumerate(zip((3, *self.channels), self.channels, strict=False)):
            layer = nn.Conv2d(inputs, outputs, 3, stride=min(n + 1, 2), padding=1, bias=False)
            # He et al. 2015, eq. 10: the variance of activations is the same at every scale
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / (9 * inputs)), generator=rng)
            self.layers.append(layer)
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        features, maps = images, []
        for layer in self.layers:
            features = nn.functional.leaky_relu(layer(features), 0.2)
            maps.append(features)
        return maps


class TimmFeatures(FeatureNetwork):
    """Intermediate features of a timm network with weights from a file.

    With `vgg16` this is the trunk of LPIPS without its learnt per-channel weights.

    Args:
        model_name: timm's name of an architecture that supports `features_only`, for example "vgg16".
        weights: path of the classification weights (safetensors, or a pickle of tensors only).
        mean: per-channel mean of the inputs in [0, 1] that the weights were trained with; ImageNet's by
            default.
        std: likewise the standard deviation.

    Raises:
        FileNotFoundError: the weights are not there.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model_name: str,
        weights: str,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"weights of {model_name} not found at {weights}: download them, or use RandomFeatures"
            )
        import timm

        self.name = model_name.split(".")[0]
        self.network = timm.create_model(
            model_name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": weights}
        )
        self.channels = tuple(self.network.feature_info.channels())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network((images / 2 + 0.5 - self.mean) / self.std)


class PooledFeatures(nn.Module):
    """One vector per picture for torchmetrics' Frechet distance: every feature map averaged over space.

    Args:
        network: makes the feature maps.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network
        self.num_features = sum(network.channels)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) to features (B, num_features)."""
        maps = self.network(images.float() / 127.5 - 1)
        return torch.cat([features.mean(dim=(2, 3)) for features in maps], dim=1)
