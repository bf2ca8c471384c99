from __future__ import annotations

import torch

from emu_lightning.processes.seeding import generator_for, mix


def test_mix_is_splitmix64() -> None:
    """Published values of splitmix64.c: first output of seed 0, first two of seed 1234567."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317
    assert mix(1234567 + 0x9E3779B97F4A7C15) == 3203168211198807973


def test_noise_is_a_function_of_seed_position_and_rank() -> None:
    draw = lambda *where: torch.randn(8, generator=generator_for(*where))  # noqa: E731
    assert torch.equal(draw(1, 64, 0), draw(1, 64, 0))
    others = [
        draw(*where) for where in [(1, 64, 0), (2, 64, 0), (1, 65, 0), (1, 64, 1), (64, 1, 0), (0, 64, 1)]
    ]
    assert len({tuple(noise.tolist()) for noise in others}) == len(others)


def test_neighbouring_positions_are_unrelated() -> None:
    noise = torch.stack([torch.randn(2000, generator=generator_for(0, position)) for position in range(64)])
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 5 / 2000**0.5  # five standard errors
    assert abs(noise.mean()) < 0.02


def test_seeds_stay_apart_in_the_32_bits_that_torch_uses() -> None:
    low = {mix(mix(mix(0) ^ position) ^ rank) & 0xFFFFFFFF for position in range(5000) for rank in range(4)}
    assert len(low) > 20_000 - 3  # 20000 random 32-bit numbers collide 0.05 times on average
