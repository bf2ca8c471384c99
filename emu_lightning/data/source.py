"""Where pictures come from: anything with a length that gives captioned pictures by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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

    `uid` and `text` answer without decoding where a subclass can: subsets and cached latents ask for them
    for every index.
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

    def uids(self) -> list[str]:
        """All names, in order."""
        return [self.uid(index) for index in range(len(self))]
