"""Pictures that are decoded once and then kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emu_lightning.data.source import Sample, Source


class InMemory(Source):
    """Keeps every sample of a source that has been read: for small pictures that are dear to make.

    Each data worker keeps its own; with `num_workers` 0 there is one copy.

    Args:
        source: whose decoded pictures fit into memory together.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index not in self._kept:
            self._kept[index] = self.source[index]
        return self._kept[index]

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def uid(self, index: int) -> str:
        return self.source.uid(index)

    def uids(self) -> list[str]:
        return self.source.uids()

    def text(self, index: int) -> str:
        return self.source.text(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(index)

    def sizes(self) -> NDArray[np.int64]:
        return self.source.sizes()

    def order(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.source.order(seed, epoch, indices)
