"""The order of samples as a function of (seed, position), so that resuming needs one number.

Training sees one endless global stream: position `n` is sample `permutation(seed, n // N)[n % N]`. A
checkpoint holds how many samples were consumed; prefetching, workers and the number of ranks do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]  # (position in the stream, index in the source)


def permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Order of one pass over the data.

    Sorts raw bits of PCG64 instead of calling `Generator.permutation`: numpy keeps the bit stream the same
    in all versions, but not what its distributions make of it.

    Returns:
        (num_samples,) a permutation of 0 ... num_samples - 1, a function of the arguments alone.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Samples of a global batch that fall to one rank."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size % world_size:
        raise ValueError(
            f"batch_size counts all devices: {batch_size} must be a multiple of {world_size} devices"
        )
    return batch_size // world_size


class ResumableBatchSampler:
    """Endless training batches of (position, index); a batch may straddle two passes, nothing is dropped.

    It has no length, so Lightning sees one endless epoch that `max_steps` ends.

    Args:
        num_samples: length of the source.
        batch_size: samples of a step over all ranks.
        seed: fixes the order.
        start: samples consumed so far. May be moved; each new iteration begins there.
        rank: this process takes the `rank`-th slice of each global batch.
        world_size: number of processes; must divide `batch_size`.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_samples < 1:
            raise ValueError("there are no samples to train on")
        self.num_samples, self.batch_size, self.seed, self.start = num_samples, batch_size, seed, start
        self.local_size = local_batch_size(batch_size, world_size)
        self.offset = rank * self.local_size

    def consumed_after(self, position: int) -> int:
        """Samples consumed over all ranks once this rank's batch that begins at `position` is done."""
        return position - self.offset + self.batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = -1, np.empty(0, np.int64)
        first = self.start + self.offset
        while True:
            batch = []
            for position in range(first, first + self.local_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = permutation(self.seed, epoch, self.num_samples)
                batch.append((position, int(order[position % self.num_samples])))
            yield batch
            first += self.batch_size


class SequentialBatchSampler:
    """Finite batches of (position, index) in the source's order, for validation and test.

    Several ranks repeat samples from the beginning until all have equally many batches of equal size, because
    a rank that ends early would leave the others waiting. One rank alone sees each sample once.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.local_size = local_batch_size(batch_size, world_size)
        self.num_samples, self.batch_size, self.offset = num_samples, batch_size, rank * self.local_size
        self.num_batches = -(-num_samples // batch_size)
        self.num_places = num_samples if world_size == 1 else self.num_batches * batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Place]]:
        for first in range(self.offset, self.num_places, self.batch_size):
            last = min(first + self.local_size, self.num_places)
            yield [(position, position % self.num_samples) for position in range(first, last)]
