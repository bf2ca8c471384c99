from __future__ import annotations

import math

import pytest
import torch

from emu_lightning.models import FourierFeatures


def test_features_are_the_formula() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    features = FourierFeatures((0, 3))(x)
    expected = [x]
    for function in (math.sin, math.cos):
        expected += [x.clone().apply_(lambda v, n=n, f=function: f(2**n * 2 * math.pi * v)) for n in (0, 3)]
    assert torch.allclose(features, torch.cat(expected, dim=1), atol=1e-12)


@pytest.mark.parametrize(("frequencies", "channels"), [((), 3), ((6, 7), 15), (range(4), 27), (range(8), 51)])
def test_number_of_channels(frequencies: tuple[int, ...], channels: int) -> None:
    fourier = FourierFeatures(frequencies)
    assert fourier.num_channels(3) == channels
    assert fourier(torch.zeros(1, 3, 2, 2)).shape == (1, channels, 2, 2)


def test_nothing_is_learnt_and_no_frequency_is_the_identity() -> None:
    assert not list(FourierFeatures((0, 1)).parameters())
    x = torch.rand(1, 3, 2, 2)
    assert FourierFeatures()(x) is x


def test_half_precision_keeps_the_angles() -> None:
    x = (torch.rand(1, 3, 8, 8) * 2 - 1).bfloat16()
    exact = FourierFeatures((7,))(x.double())
    assert torch.allclose(FourierFeatures((7,))(x).double(), exact, atol=0.01)


@pytest.mark.parametrize("frequencies", [(-1,), (1, 1)])
def test_impossible_frequencies_are_refused(frequencies: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="distinct and >= 0"):
        FourierFeatures(frequencies)
