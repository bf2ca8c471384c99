"""Aspect-ratio buckets: pictures of like shape share a batch, so that few of their pixels are cropped away.

A picture belongs to the bucket whose logarithm of height / width is nearest to its own, so that 2:1 and 1:2
are equally far from the square. Nothing is dropped: every picture has a bucket, and every bucket is an
endless stream of its own (see `data/sampler.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bucketing:
    """Which picture is learned at which size.

    Attributes:
        sizes: (K, 2) height and width in pixels of each bucket, from the widest to the tallest.
        bucket_of: (N,) the bucket of each picture.
        merged: sizes that had too few pictures, and how many: these went to the nearest of the others.
    """

    sizes: NDArray[np.int64]
    bucket_of: NDArray[np.int64]
    merged: list[tuple[tuple[int, int], int]]

    @property
    def picture_sizes(self) -> NDArray[np.int64]:
        """(N, 2) height and width in pixels at which each picture is learned."""
        return self.sizes[self.bucket_of]

    @property
    def members(self) -> list[NDArray[np.int64]]:
        """Indices of the pictures of each bucket, ascending."""
        return [np.flatnonzero(self.bucket_of == bucket) for bucket in range(len(self.sizes))]

    def digest(self) -> str:
        """Eight characters that change with any picture's size."""
        return hashlib.sha256(self.picture_sizes.tobytes()).hexdigest()[:8]

    def describe(self) -> str:
        """One line a bucket: its size and how many pictures it has."""
        lines = [
            f"bucket {height} x {width}: {len(members)} pictures"
            for (height, width), members in zip(self.sizes.tolist(), self.members, strict=True)
        ]
        lines += [
            f"bucket {height} x {width} has {num} pictures, too few for a batch: they join the nearest bucket"
            for (height, width), num in self.merged
        ]
        return "\n".join(lines)


class Buckets:
    """Sizes of about `resolution` x `resolution` pixels in area, one for each aspect ratio.

    Args:
        resolution: side of the square among them, pixels. No other holds more pixels.
        step: sides are multiples of it, pixels. The autoencoder's and the denoiser's downsampling divide it.
        max_ratio: of the longer to the shorter side; longer pictures are cropped to it.

    Raises:
        ValueError: `resolution` is not a multiple of `step`, or `max_ratio` is below 1.
    """

    def __init__(self, resolution: int, step: int = 64, max_ratio: float = 2.0) -> None:
        if step < 1 or resolution < 1 or resolution % step:
            raise ValueError(f"buckets.resolution {resolution} must be a multiple of buckets.step {step}")
        if max_ratio < 1:
            raise ValueError(f"buckets.max_ratio must be at least 1 (squares only), got {max_ratio}")
        self.resolution, self.step, self.max_ratio = resolution, step, max_ratio

    def sizes(self) -> NDArray[np.int64]:
        """(K, 2) all heights and widths, from the widest to the tallest."""
        longer = [(short, self.resolution**2 // short // self.step * self.step) for short in self._shorter()]
        wide = [(short, long) for short, long in longer if long <= self.max_ratio * short]
        return np.array([*wide, *((long, short) for short, long in reversed(wide) if long != short)])

    def _shorter(self) -> range:
        return range(self.step, self.resolution + 1, self.step)

    def assign(self, sizes: NDArray[np.int64], min_pictures: int = 1) -> Bucketing:
        """The bucket of each picture, among those that get enough pictures.

        The emptiest bucket with fewer than `min_pictures` is taken away, and its pictures go to the nearest
        of the others; then again, until all are full enough or one is left.

        Args:
            sizes: (N, 2) heights and widths in pixels; N at least 1.
            min_pictures: of a bucket, usually the batch size.
        """
        known = np.maximum(sizes, 1)  # a table may say 0 for what it does not know
        ratios = np.log(known[:, 0] / known[:, 1])
        kept = self.sizes()
        merged: list[tuple[tuple[int, int], int]] = []
        while True:
            bucket_of = _nearest(ratios, kept)
            counts = np.bincount(bucket_of, minlength=len(kept))
            emptiest = int(counts.argmin())
            if len(kept) == 1 or counts[emptiest] >= max(min_pictures, 1):
                return Bucketing(kept, bucket_of, merged)
            if counts[emptiest]:
                height, width = kept[emptiest].tolist()
                merged.append(((height, width), int(counts[emptiest])))
            kept = np.delete(kept, emptiest, axis=0)


def _nearest(ratios: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the size whose log ratio is nearest to each of `ratios`; of two equally near, the first."""
    own = np.log(sizes[:, 0] / sizes[:, 1])  # ascending
    return np.searchsorted((own[1:] + own[:-1]) / 2, ratios)
