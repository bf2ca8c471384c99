"""The moving average against its formula and diffusers' EMAModel."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.testing import assert_close

from emu_lightning.models.ema import EMA


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model: nn.Module, step: int) -> None:
    """Stands in for an optimizer step."""
    rng = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng))
    model(torch.randn(8, 3, generator=rng))  # moves the batch norm's buffers


def test_the_average_moves_by_the_formula():
    model = network()
    ema = EMA(model, decay=0.9, warmup=False)
    before = deepcopy(model[0].weight)
    train(model, 0)
    ema.update(model)
    assert not torch.equal(ema.model[0].weight, before)
    assert_close(ema.model[0].weight, (0.9 * before + 0.1 * model[0].weight).detach())


def test_the_average_is_that_of_diffusers():
    model = network()
    ema, reference = EMA(model, decay=0.8), EMAModel(model.parameters(), decay=0.8)
    # diffusers' first update copies; ours has decay 0.1. From equal weights the two agree.
    ema.update(model)
    reference.step(model.parameters())
    for step in range(60):
        train(model, step)
        ema.update(model)
        reference.step(model.parameters())
        for ours, theirs in zip(ema.model.parameters(), reference.shadow_params, strict=True):
            assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_warmup_ramps_to_the_decay():
    model, decays = network(), []
    ema = EMA(model, decay=0.5)
    for _ in range(12):
        decays.append(ema.current_decay())
        ema.update(model)
    assert decays == [min(0.5, (1 + n) / (10 + n)) for n in range(12)]


def test_resuming_is_exact():
    model = network()
    ema = EMA(model)
    for step in range(5):
        train(model, step)
        ema.update(model)
    resumed_model, resumed = deepcopy(model), EMA(network())
    resumed.load_state_dict(ema.state_dict())
    for step in range(5, 10):
        for one, average in ((model, ema), (resumed_model, resumed)):
            train(one, step)
            average.update(one)
    assert resumed.current_decay() == ema.current_decay() == 11 / 20
    for name, value in ema.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resuming_inside_a_parent_module_is_exact():
    model = network()
    parent, resumed = nn.ModuleDict({"ema": EMA(model)}), nn.ModuleDict({"ema": EMA(network())})
    parent["ema"].update(model)
    resumed.load_state_dict(parent.state_dict())
    assert resumed["ema"].current_decay() == 2 / 11


def test_buffers_are_copied_and_nothing_is_trained():
    model = network()
    ema = EMA(model)
    train(model, 0)
    ema.update(model)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert not any(weight.requires_grad for weight in ema.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_half_precision_weights_have_a_full_precision_average():
    model = network()
    ema = EMA(model, decay=0.9)
    train(model, 0)
    ema.update(deepcopy(model).bfloat16())
    assert ema.model[0].weight.dtype == torch.float32


def test_restarting_forgets():
    model = network()
    ema = EMA(model)
    train(model, 0)
    ema.update(model)
    train(model, 1)
    ema.restart(model)
    fresh = EMA(model)
    assert ema.current_decay() == fresh.current_decay()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, ema.state_dict()[name]), name


def test_a_decay_outside_its_range_is_named():
    with pytest.raises(ValueError, match="decay=1.0"):
        EMA(network(), decay=1.0)
