from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from emu_lightning.processes.seeding import (
    generator_for,
    generators_for,
    integers,
    mix,
    next_seed,
    normal,
    picture_generators,
    uniform,
)


def test_mix_is_splitmix64() -> None:
    """Published values of splitmix64.c: first output of seed 0, first two of seed 1234567."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317
    assert mix(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973


def test_noise_is_a_function_of_seed_and_position() -> None:
    draw = lambda *where: torch.randn(8, generator=generator_for(*where))  # noqa: E731
    assert torch.equal(draw(1, 64), draw(1, 64))
    others = [draw(*where) for where in [(1, 64), (2, 64), (1, 65), (64, 1), (0, 64)]]
    assert len({tuple(noise.tolist()) for noise in others}) == len(others)


@pytest.mark.parametrize("make", [uniform, normal, partial(integers, 1000)])
def test_a_sample_draws_the_same_in_every_batch(make: Any) -> None:
    """Split over two processes, the values are those of one."""
    whole = make(8, generators_for(3, range(40, 48)))
    halves = [make(4, generators_for(3, range(start, start + 4))) for start in (40, 44)]
    assert torch.equal(whole, torch.cat(halves))
    assert len(set(whole.tolist())) == 8
    assert make(1, generator_for(3, 40)) == whole[0]


def test_neighbouring_positions_are_unrelated() -> None:
    noise = torch.stack([torch.randn(2000, generator=generator_for(0, position)) for position in range(64)])
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 5 / 2000**0.5  # five standard errors
    assert abs(noise.mean()) < 0.02


def test_seeds_stay_apart_in_the_32_bits_that_torch_uses() -> None:
    low = {mix(mix(seed) ^ position) & 0xFFFFFFFF for position in range(5000) for seed in range(4)}
    assert len(low) > 20_000 - 3  # 20000 random 32-bit numbers collide 0.05 times on average


def test_the_stages_of_a_picture_have_seeds_of_their_own() -> None:
    """Pictures are mostly seeded by 0, 1, 2, ...; none of them draws the noise of another's later stage."""
    seeds = list(range(5000))
    stages = [seeds, [next_seed(seed) for seed in seeds], [next_seed(next_seed(seed)) for seed in seeds]]
    assert all(0 <= seed < 1 << 63 for stage in stages for seed in stage)
    assert len({seed & 0xFFFFFFFF for stage in stages for seed in stage}) > 15_000 - 3
    noise = normal(15, picture_generators(seed for stage in stages for seed in stage[:5]))
    assert len(set(noise.tolist())) == 15
    assert torch.equal(noise[1], torch.randn(1, generator=torch.Generator().manual_seed(1))[0])
