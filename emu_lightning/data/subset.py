"""Choosing some samples of a source, by number or by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu_lightning.data.source import Sample, Source


def nested_subset(uids: Sequence[str], size: int, seed: int) -> list[int]:
    """Indices of `size` samples, chosen by a hash of (seed, uid).

    The 100 are among the 500, and adding or removing samples never changes the order of the others.

    Args:
        uids: names of all samples.
        size: how many to choose.
        seed: another seed is another choice.

    Returns:
        Indices into `uids`, in the order of choice: the subset of 100 is the first 100 of the subset of 500.

    Raises:
        ValueError: there are fewer than `size`.
    """
    if not 0 < size <= len(uids):
        raise ValueError(f"subset_size must be between 1 and the {len(uids)} images there are, got {size}")
    rank = {index: hashlib.sha256(f"{seed}:{uid}".encode()).digest() for index, uid in enumerate(uids)}
    return sorted(rank, key=rank.__getitem__)[:size]


def read_selection(path: str | Path) -> list[str]:
    """Uids from a file: JSON (a list, or an object with a list `uids`), or text with one uid a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no list of uids.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"selection file {path} does not exist")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() != ".json":
        uids = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"selection file {path} is not JSON: {error}") from None
        listed = content.get("uids") if isinstance(content, dict) else content
        if not isinstance(listed, list) or not all(isinstance(uid, str) for uid in listed):
            raise ValueError(
                f"selection file {path} must hold a list of uids, or an object with a list 'uids'"
            )
        uids = listed
    if not uids:
        raise ValueError(f"selection file {path} selects nothing")
    return list(dict.fromkeys(uids))


def find_uids(source: Source, uids: Sequence[str]) -> list[int]:
    """Indices of `uids` in `source`, in the order of `uids`.

    Raises:
        ValueError: some are not there.
    """
    index_of = {uid: index for index, uid in enumerate(source.uids())}
    missing = [uid for uid in uids if uid not in index_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(uids)} selected uids are not in the training data, such as "
            f"{missing[0]!r}: they come from other data, or are held out for validation"
        )
    return [index_of[uid] for uid in uids]


class Subset(Source):
    """Some samples of `source`, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[index])]

    def uid(self, index: int) -> str:
        return self.source.uid(int(self.indices[index]))

    def text(self, index: int) -> str:
        return self.source.text(int(self.indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]))

    def sizes(self) -> NDArray[np.int64]:
        return self.source.sizes()[self.indices]

    def order(self, seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.source.order(seed, epoch, self.indices[indices])

    def fingerprint(self) -> str:
        content = json.dumps([self.source.fingerprint(), self.indices.tolist()])
        return "subset-1:" + hashlib.sha256(content.encode()).hexdigest()
