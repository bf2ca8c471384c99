"""From a source's pictures to tensors: resize, crop, flip, and step over what cannot be decoded."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from emu_lightning.data.batch import Batch
from emu_lightning.data.sampler import Place
from emu_lightning.data.source import BrokenImage, Sample, Source

Crop = Literal["center", "random"]


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """`image` with its shorter side of `resolution` pixels, antialiased (Lanczos)."""
    width, height = image.size
    shorter = min(width, height)
    if shorter == resolution:
        return image
    size = (
        max(resolution, round(width * resolution / shorter)),
        max(resolution, round(height * resolution / shorter)),
    )
    return image.resize(size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [-1, 1] of an RGB image."""
    pixels = torch.from_numpy(np.array(image))  # np.array copies: PIL's own memory is read-only
    return (
        pixels.permute(2, 0, 1).unsqueeze(0).to(torch.float32, memory_format=torch.contiguous_format) / 127.5
        - 1
    )


class Pictures(Dataset[Batch]):
    """A source as square tensors: one :class:`Batch` of a single picture for each (position, index).

    A picture that cannot be decoded is replaced by the next index that can, and named in `Batch.broken`.

    Args:
        source: the pictures.
        resolution: side of the crop in pixels; the shorter side is resized to it first.
        crop: `center`, or `random`: a function of (seed, position).
        use_flip: mirror every second picture, a function of (seed, position).
        seed: of cropping and flipping.
    """

    def __init__(
        self, source: Source, resolution: int, crop: Crop = "center", use_flip: bool = False, seed: int = 0
    ) -> None:
        self.source, self.resolution, self.crop, self.use_flip, self.seed = (
            source,
            resolution,
            crop,
            use_flip,
            seed,
        )
        self.broken: dict[int, str] = {}  # what this process has met, so that it is decoded in vain only once

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Batch:
        position, index = place
        sample, broken = self._decode(index)
        image = sample.image if isinstance(sample.image, Image.Image) else Image.fromarray(sample.image)
        image = resize_shorter_side(image, self.resolution)
        slack = np.array([image.height, image.width]) - self.resolution
        shift, flip = np.random.default_rng((self.seed, position)).random((2, 2))
        top, left = np.floor(shift * (slack + 1)).astype(int) if self.crop == "random" else slack // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.use_flip and flip[0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Batch(
            images=to_tensor(image),
            latents=None,
            texts=[sample.text],
            uids=[sample.uid],
            original_size=torch.tensor([sample.original_size]),
            crop=torch.tensor([[int(top), int(left)]]),
            target_size=torch.tensor([[self.resolution] * 2]),
            position=position,
            broken=broken,
        )

    def _decode(self, index: int) -> tuple[Sample, list[str]]:
        names: list[str] = []
        for step in range(len(self.source)):
            candidate = (index + step) % len(self.source)
            if candidate not in self.broken:
                try:
                    return self.source[candidate], names
                except BrokenImage as error:
                    self.broken[candidate] = error.name
            names.append(self.broken[candidate])
        raise ValueError(f"none of the {len(self.source)} images can be decoded (the first: {names[0]})")
