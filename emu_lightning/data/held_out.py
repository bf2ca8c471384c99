"""Holding out some pictures for validation, by their names."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import numpy as np

from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.source import Source
from emu_lightning.data.subset import Subset


def is_held_out(uid: str, fraction: float) -> bool:
    """Whether `uid` belongs to validation: a hash of its name, so that other images do not matter."""
    digest = hashlib.sha256(f"validation:{uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class HeldOutData(ImageData):
    """Pictures from one source, a share of them held out for validation.

    Args:
        val_fraction: share held out, in [0, 1); chosen by a hash of each picture's uid.
        kwargs: of :class:`~emu_lightning.data.datamodule.ImageData`.
    """

    def __init__(self, val_fraction: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
        self.val_fraction = val_fraction
        self._parts: tuple[Source, Source] | None = None

    @abstractmethod
    def whole_source(self) -> Source:
        """The pictures of training and of validation."""

    def train_source(self) -> Source:
        return self._split()[0]

    def val_source(self) -> Source | None:
        held_out = self._split()[1]
        return held_out if len(held_out) else None

    def _split(self) -> tuple[Source, Source]:
        if self._parts is None:
            whole = self.whole_source()
            is_val = np.array([is_held_out(uid, self.val_fraction) for uid in whole.uids()])
            train, val = (np.flatnonzero(part).tolist() for part in (~is_val, is_val))
            self._parts = Subset(whole, train), Subset(whole, val)
        return self._parts
