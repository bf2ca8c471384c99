"""Randomness as a function of place, not of history.

A step's noise comes from ``(seed, position, rank)``, so a run that was killed and resumed, or that sees its
batches from other workers, draws exactly what the uninterrupted run drew.
"""

from __future__ import annotations

import torch

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


def generator_for(
    seed: int, position: int, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Makes the random generator of one batch.

    Args:
        seed: the run's seed.
        position: global index of the batch's first sample (`Batch.position`).
        rank: process index; ranks draw different noise.
        device: where the numbers are drawn. CPU and CUDA draw different numbers from one seed.

    Returns:
        A fresh generator. Neighbouring arguments give unrelated streams: torch's CPU generator keeps only the
        low 32 bits of its seed, so the arguments are hashed, never added.
    """
    return torch.Generator(device).manual_seed(mix(mix(mix(seed) ^ position) ^ rank))
