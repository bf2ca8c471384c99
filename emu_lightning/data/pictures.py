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


def resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """`image` resized to the smallest size that covers `height` x `width` pixels, antialiased (Lanczos)."""
    if image.height * width <= image.width * height:  # it is wider: the heights become equal
        size = max(width, round(image.width * height / image.height)), height
    else:
        size = width, max(height, round(image.height * width / image.width))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 in [-1, 1] of an RGB image."""
    pixels = torch.from_numpy(np.array(image))  # np.array copies: PIL's own memory is read-only
    return (
        pixels.permute(2, 0, 1).unsqueeze(0).to(torch.float32, memory_format=torch.contiguous_format) / 127.5
        - 1
    )


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
        image = resize_to_cover(image, height, width)
        slack = np.array([image.height - height, image.width - width])
        shift, flip = np.random.default_rng((self.seed, position)).random((2, 2))
        place_of_crop = np.floor(shift * (slack + 1)).astype(int) if self.crop == "random" else slack // 2
        top, left = place_of_crop.tolist()
        image = image.crop((left, top, left + width, top + height))
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
