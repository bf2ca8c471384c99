"""What data gives to modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

Embeddings = dict[str, Tensor]  # what frozen text encoders make of B texts: every tensor is (B, ...)


@dataclass
class Batch:
    """Captioned pictures of one step on one rank, as images or as cached latents.

    Not frozen: Lightning moves the tensors of a dataclass to the device by assigning its fields.

    Attributes:
        images: (B, 3, H, W) float in [-1, 1], or None when `latents` are given.
        latents: (B, C, h, w) normalised latents, or None when `images` are given.
        texts: B captions.
        embeddings: of `texts`, where they are cached.
        empty_embeddings: of the text "", (1, ...) each, given together with `embeddings`: dropped captions.
        original_size: (B, 2) int64, height and width in pixels before resizing.
        crop: (B, 2) int64, top and left of the crop in the resized picture, in pixels.
        target_size: (B, 2) int64, height and width in pixels of what is learned.
        uids: B names, unique within the source.
        position: index, in the endless global stream of training samples, of this batch's first sample; the
            others follow it. Noise and augmentation of a sample are functions of (seed, its position).
        broken: names of the files skipped while making this batch.
    """

    images: Tensor | None
    latents: Tensor | None
    texts: list[str]
    original_size: Tensor
    crop: Tensor
    target_size: Tensor
    uids: list[str]
    position: int = 0
    broken: list[str] = field(default_factory=list)
    embeddings: Embeddings | None = None
    empty_embeddings: Embeddings | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def positions(self) -> range:
        """The place of each sample in the endless global stream."""
        return range(self.position, self.position + len(self))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by DataLoader when it pins."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                setattr(self, each.name, value.pin_memory())
            elif isinstance(value, dict):
                setattr(self, each.name, {name: tensor.pin_memory() for name, tensor in value.items()})
        return self


def resized(batch: Batch, side: int) -> Batch:
    """The batch with its images (square) resized to `side` pixels, antialiased, and the sizes to match.

    Raises:
        ValueError: it has no images, or they are not square, or smaller: a stage would learn from blown-up
            pictures.
    """
    if batch.images is None:
        raise ValueError("stages learn from images, but the data gives latents: switch their cache off")
    height, width = batch.images.shape[-2:]
    if height != width:
        raise ValueError(
            f"stages learn from square images, but the data gives {height}x{width}: leave data.buckets out"
        )
    if height == side:
        return batch
    if height < side:
        raise ValueError(
            f"images of {height}x{width} are too small for a stage of {side} pixels: raise data.resolution"
        )
    images = interpolate(batch.images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    crop = (batch.crop * side / height).round().to(batch.crop.dtype)
    return replace(batch, images=images, crop=crop, target_size=torch.full_like(batch.target_size, side))


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`; in a data worker into shared memory, which saves a copy on the way out of it."""
    if get_worker_info() is None:
        return torch.cat(list(parts))
    num = sum(part.numel() for part in parts)
    storage = torch.UntypedStorage._new_shared(num * parts[0].element_size(), device="cpu")
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    joined = torch.empty(0, dtype=parts[0].dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    return torch.cat(list(parts), out=joined)


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches along B; the position is that of the first.

    Args:
        batches: at least one, all with images or all with latents, of equal (C, H, W); without embeddings,
            which `CachedTexts.collate` adds to whole batches.
    """
    if len(batches) == 1:
        return batches[0]

    def join(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else _concatenate(parts)

    tensors: dict[str, Any] = {
        name: join(name) for name in ("images", "latents", "original_size", "crop", "target_size")
    }
    return Batch(
        **tensors,
        texts=[text for batch in batches for text in batch.texts],
        uids=[uid for batch in batches for uid in batch.uids],
        position=batches[0].position,
        broken=[name for batch in batches for name in batch.broken],
    )
