"""From a source's pictures to tensors: resize, crop, flip, and step over what cannot be decoded."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from emu_lightning.data.batch import Batch
from emu_lightning.data.sampler import Place
from emu_lightning.data.source import BrokenImage, Sample, Source

Crop = Literal["center", "random"]


def covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Height and width of the smallest picture of `image`'s shape that covers `height` x `width` pixels."""
    if image.height * width <= image.width * height:  # it is wider: the heights become equal
        return height, max(width, round(image.width * height / image.height))
    return max(height, round(image.height * width / image.width)), width


def resized_crop(
    image: Image.Image, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> Image.Image:
    """The crop of `image` resized to `size` (height, width), antialiased (Lanczos); the rest is not made."""
    if size == (image.height, image.width):
        return image.crop((left, top, left + width, top + height))
    down, across = image.height / size[0], image.width / size[1]
    lower, right = min((top + height) * down, image.height), min((left + width) * across, image.width)
    box = (left * across, top * down, right, lower)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [-1, 1] of an RGB image."""
    pixels = torch.from_numpy(np.array(image))  # np.array copies: PIL's own memory is read-only
    images = pixels.permute(2, 0, 1).unsqueeze(0).to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(127.5).sub_(1)


class Pictures(Dataset[Batch]):
    """A source as tensors: one :class:`Batch` of a single picture for each (position, index).

    A picture is resized until it covers its size, then cropped. One that cannot be decoded is replaced by the
    next index that can, at the size of the one asked for, and named in `Batch.broken`.

    Args:
        source: the N pictures.
        size: side of the square in pixels, or (N, 2) height and width for each index.
        crop: `center`, or `random`: a function of (seed, position).
        use_flip: mirror every second picture, a function of (seed, position).
        seed: of cropping and flipping.
    """

    def __init__(
        self,
        source: Source,
        size: int | NDArray[np.int64],
        crop: Crop = "center",
        use_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.source, self.crop, self.use_flip, self.seed = source, crop, use_flip, seed
        self.sizes = np.broadcast_to(np.asarray(size), (len(source), 2))
        self.broken: dict[int, str] = {}  # what this process has met, so that it is decoded in vain only once

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Batch:
        position, index = place
        height, width = self.sizes[index].tolist()
        sample, broken = self._decode(index)
        image = sample.image if isinstance(sample.image, Image.Image) else Image.fromarray(sample.image)
        size = covering_size(image, height, width)
        slack = np.array([size[0] - height, size[1] - width])
        shift, flip = np.random.default_rng((self.seed, position)).random((2, 2))
        place_of_crop = np.floor(shift * (slack + 1)).astype(int) if self.crop == "random" else slack // 2
        top, left = place_of_crop.tolist()
        image = resized_crop(image, size, top, left, height, width)
        if self.use_flip and flip[0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = int(slack[1]) - left  # as if the whole picture had been mirrored first
        return Batch(
            images=to_tensor(image),
            latents=None,
            texts=[sample.text],
            uids=[sample.uid],
            original_size=torch.tensor([sample.original_size]),
            crop=torch.tensor([[top, left]]),
            target_size=torch.tensor([[height, width]]),
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
