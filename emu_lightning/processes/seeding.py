"""Randomness as a function of place, not of history.

A sample's noise comes from ``(seed, position)``, its place in the global stream of training samples. So a
run that was killed and resumed, that gets its batches from other workers, or that is spread over another
number of processes or accumulated batches, draws for each sample what the uninterrupted single process drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Rng = torch.Generator | list[torch.Generator]  # a list holds one generator per sample of the batch

_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """One step of splitmix64: a bijection of the 64-bit integers in which every input bit moves every output
    bit.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"; constants of Vigna's
    public-domain splitmix64.c.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def generator_for(seed: int, position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Makes the random generator of one sample.

    Args:
        seed: the run's seed.
        position: index of the sample in the global stream (`Batch.position` is that of a batch's first).
        device: where the numbers are drawn. CPU and CUDA draw different numbers from one seed.

    Returns:
        A fresh generator. Neighbouring arguments give unrelated streams: torch's CPU generator keeps only the
        low 32 bits of its seed, so the arguments are hashed, never added.
    """
    return torch.Generator(device).manual_seed(mix(mix(seed) ^ position))


def generators_for(
    seed: int, positions: Iterable[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One :func:`generator_for` per sample."""
    return [generator_for(seed, position, device) for position in positions]


def picture_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator a picture: a seed means the same picture in every batch and on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def next_seed(seed: int) -> int:
    """The seed of a picture's next stage: another stream, so that its noise has nothing of this one's."""
    return mix(seed) >> 1  # torch takes 63 bits


def draw(make: Callable[[int, torch.Generator], Tensor], num: int, rng: Rng) -> Tensor:
    """`num` random values.

    Args:
        make: (number, generator) -> values (number, ...).
        num: how many.
        rng: one generator, or a list of `num`, each of which then makes one value.
    """
    return torch.cat([make(1, each) for each in rng]) if isinstance(rng, list) else make(num, rng)


def uniform(num: int, rng: Rng) -> Tensor:
    """(num,) float32, uniform in [0, 1), on the generator's device."""
    return draw(lambda n, generator: torch.rand(n, generator=generator, device=generator.device), num, rng)


def normal(num: int, rng: Rng) -> Tensor:
    """(num,) float32, standard normal, on the generator's device."""
    return draw(lambda n, generator: torch.randn(n, generator=generator, device=generator.device), num, rng)


def integers(high: int, num: int, rng: Rng) -> Tensor:
    """(num,) int64, uniform in 0 ... high - 1, on the generator's device."""
    return draw(
        lambda n, generator: torch.randint(high, (n,), generator=generator, device=generator.device), num, rng
    )
