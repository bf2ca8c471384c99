"""Where pictures come from: anything with a length that gives captioned pictures by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu_lightning.data.sampler import permutation


class BrokenImage(Exception):
    """A picture that cannot be decoded. It is skipped and reported, it does not end a run.

    Args:
        name: the file, as the user knows it.
        reason: what the decoder said.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One captioned picture.

    Attributes:
        image: (H, W, 3) uint8, or a PIL image in mode RGB.
        text: the caption.
        uid: name, unique within the source.
        original_size: height and width in pixels.
    """

    image: NDArray[np.uint8] | Image.Image
    text: str
    uid: str
    original_size: tuple[int, int]


class Source(ABC):
    """A finite, indexable, picklable collection of captioned pictures. No resizing, no randomness.

    `uid`, `text` and `size` answer without decoding where a subclass can: subsets, cached latents and buckets
    ask for them for every index.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index` in [0, len).

        Raises:
            BrokenImage: it cannot be decoded.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of all pictures and their order: it changes whenever a pixel may have changed.

        Captions do not count: cached latents stay valid when a caption is edited.
        """

    def uid(self, index: int) -> str:
        """Name of the sample at `index`."""
        return self[index].uid

    def text(self, index: int) -> str:
        """Caption of the sample at `index`."""
        return self[index].text

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of the sample at `index`, upright.

        Raises:
            BrokenImage: it cannot be read.
        """
        return self[index].original_size

    def uids(self) -> list[str]:
        """All names, in order."""
        return [self.uid(index) for index in range(len(self))]

    def sizes(self) -> NDArray[np.int64]:
        """(N, 2) heights and widths in pixels; 1 x 1 where a picture cannot be read."""
        sizes = np.ones((len(self), 2), np.int64)
        for index in range(len(self)):
            with suppress(BrokenImage):
                sizes[index] = self.size(index)
        return sizes

    def order(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order of one training pass over the samples at `indices` (all, a subset, or one bucket's).

        A subclass overrides it where some orders are read faster than others.

        Returns:
            (len(indices),) a permutation of 0 ... len(indices) - 1: places in `indices`, not in the source.
            A function of the arguments alone.
        """
        return permutation(seed, epoch, len(indices))
