"""The order of samples as a function of (seed, position), so that resuming needs one number.

Training sees one endless global stream, of which optimizer step `k` learns the positions from
`k * batch_size` to `(k + 1) * batch_size`, however they are spread over processes and accumulated batches. A
checkpoint holds how many samples were consumed; prefetching, workers and the number of ranks do not matter.

Without buckets, position `n` is sample `n % N` of pass `n // N` over the N samples. With buckets each bucket
is such a stream of its own, and every step goes on with one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emu_lightning.processes.seeding import mix

Place = tuple[int, int]  # (position in the stream, index in the source)
Indices = NDArray[np.int64]


def permutation(seed: int, epoch: int, num_samples: int) -> Indices:
    """Order of one pass over the data.

    Sorts raw bits of PCG64 instead of calling `Generator.permutation`: numpy keeps the bit stream the same
    in all versions, but not what its distributions make of it.

    Returns:
        (num_samples,) a permutation of 0 ... num_samples - 1, a function of the arguments alone.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


# --- endless streams ----------------------------------------------------------------------------------------


class Stream(Protocol):
    """Which sample of the source stands at each position, without end."""

    def indices(self, first: int, num: int) -> Indices:
        """(num,) indices in the source at the positions from `first` on, all within one optimizer step."""


class Passes:
    """One pass over `members` after another.

    Args:
        members: (N,) indices in the source; N at least 1.
        order: (epoch, members) -> (N,) a permutation of 0 ... N - 1, of that pass.
    """

    def __init__(self, members: Indices, order: Callable[[int, Indices], Indices]) -> None:
        if not len(members):
            raise ValueError("there are no samples to train on")
        self.members, self.order = members, order
        self._epoch, self._pass = -1, members[:0]

    def indices(self, first: int, num: int) -> Indices:
        parts = []
        while num > 0:
            epoch, start = divmod(first, len(self.members))
            if epoch != self._epoch:
                self._epoch, self._pass = epoch, self.members[self.order(epoch, self.members)]
            parts.append(self._pass[start : start + num])
            first, num = first + len(parts[-1]), num - len(parts[-1])
        return np.concatenate(parts)


class BucketTurns:
    """Whole steps of one bucket after another, each bucket's share that of its samples.

    The bucket of step k is where a low-discrepancy sequence, u_k = u_0 + k * golden ratio mod 1 (Weyl 1916),
    falls among the cumulated shares, so that after any number of steps each bucket has had its share to
    within a few steps. u is kept as a 64-bit integer: how often a bucket had its turn before step k is then
    counted exactly and without walking there.

    Args:
        buckets: an endless stream each.
        num_samples: of each bucket; its weight.
        batch_size: samples of a step.
        seed: fixes u_0.
    """

    _RANGE = 1 << 64
    _STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, made odd

    def __init__(
        self, buckets: Sequence[Stream], num_samples: Sequence[int], batch_size: int, seed: int
    ) -> None:
        self.buckets, self.batch_size, self._start = buckets, batch_size, mix(seed)
        cumulated = [0, *np.cumsum(num_samples).tolist()]
        self._bounds = [below * self._RANGE // cumulated[-1] for below in cumulated]

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of `step`, and how many steps that bucket had before it."""
        value = (self._start + step * self._STRIDE) % self._RANGE
        bucket = next(b for b, bound in enumerate(self._bounds[1:]) if value < bound)
        low, high = (self._count(step, bound) for bound in self._bounds[bucket : bucket + 2])
        return bucket, high - low

    def indices(self, first: int, num: int) -> Indices:
        step, within = divmod(first, self.batch_size)
        bucket, turns = self.turn(step)
        return self.buckets[bucket].indices(turns * self.batch_size + within, num)

    def _count(self, num_steps: int, bound: int) -> int:
        """How many of the first steps have a value below `bound`, which is at most `_RANGE`.

        x mod m < bound exactly where floor(x / m) - floor((x - bound) / m) is 1 and not 0.
        """
        whole = _floor_sum(num_steps, self._RANGE, self._STRIDE, self._start)
        return (
            whole
            + num_steps
            - _floor_sum(num_steps, self._RANGE, self._STRIDE, self._start + self._RANGE - bound)
        )


def _floor_sum(num: int, divisor: int, slope: int, offset: int) -> int:
    """Sum over i < num of floor((slope * i + offset) / divisor), in as many rounds as Euclid's algorithm.

    Source: Graham, Knuth & Patashnik, Concrete Mathematics, 3.5.
    """
    total = 0
    while True:
        total += slope // divisor * (num * (num - 1) // 2) + offset // divisor * num
        last = slope % divisor * num + offset % divisor
        if last < divisor:
            return total
        num, offset, slope, divisor = last // divisor, last % divisor, divisor, slope % divisor


# --- batches ------------------------------------------------------------------------------------------------


def local_batch_size(batch_size: int, world_size: int, num_accumulated: int = 1) -> int:
    """Samples of a global batch that one process takes at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size % (world_size * num_accumulated):
        raise ValueError(
            "data.batch_size counts all samples of an optimizer step: "
            f"{batch_size} must be a multiple of {world_size} devices x {num_accumulated} accumulated batches"
        )
    return batch_size // (world_size * num_accumulated)


class ResumableBatchSampler:
    """Endless training batches of (position, index); a batch may straddle two passes, nothing is dropped.

    It has no length, so Lightning sees one endless epoch that `max_steps` ends.

    Args:
        stream: what is where.
        batch_size: samples of an optimizer step over all ranks and accumulated batches.
        start: samples consumed so far, whole steps. May be moved; each new iteration begins there.
        rank: this process takes the `rank`-th slice of what all processes take at once.
        world_size: number of processes.
        num_accumulated: batches of each process in a step; times `world_size` it must divide `batch_size`.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_accumulated: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.start = stream, batch_size, start
        self.local_size = local_batch_size(batch_size, world_size, num_accumulated)
        self.offset, self.stride = rank * self.local_size, world_size * self.local_size

    def consumed_after(self, position: int) -> int:
        """Samples of whole steps over all ranks once this rank's batch that begins at `position` is done."""
        step, within = divmod(position - self.start, self.batch_size)
        is_last = within + self.stride >= self.batch_size
        return self.start + (step + is_last) * self.batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        first = self.start + self.offset
        while True:
            indices = self.stream.indices(first, self.local_size).tolist()
            yield list(zip(range(first, first + self.local_size), indices, strict=True))
            first += self.stride


class SequentialBatchSampler:
    """Finite batches of (position, index) in the source's order, group by group, for validation and test.

    Several ranks repeat samples from a group's beginning until all have equally many batches of equal size,
    because a rank that ends early would leave the others waiting. One rank alone sees each sample once.

    Args:
        groups: indices in the source; no batch mixes two groups.
        local_size: samples that a process takes at once.
        rank, world_size: as in :class:`ResumableBatchSampler`.
    """

    def __init__(
        self, groups: Sequence[Indices], local_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.groups, self.local_size, self.rank, self.world_size = groups, local_size, rank, world_size

    def __len__(self) -> int:
        return sum(-(-len(group) // (self.local_size * self.world_size)) for group in self.groups)

    def __iter__(self) -> Iterator[list[Place]]:
        start = 0
        stride = self.local_size * self.world_size
        for group in self.groups:
            num = len(group) if self.world_size == 1 else -(-len(group) // stride) * stride
            for first in range(self.rank * self.local_size, num, stride):
                places = range(first, min(first + self.local_size, num))
                yield [(start + place, int(group[place % len(group)])) for place in places]
            start += len(group)
