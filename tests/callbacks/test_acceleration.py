"""Every switch leaves the loss, the names of weights and what is handed over as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor

from emu_lightning.callbacks import Acceleration, Throughput
from emu_lightning.models import SmallTextEncoder
from emu_lightning.modules import load_generator
from tests.tiny import TinyData, make_trainer, tiny_generator


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.values.append(trainer.callback_metrics["train/loss"])


def losses_of(folder: Path, *callbacks: Callback, module=None, steps: int = 3) -> list[float]:
    """Training losses, from equal weights unless a module is given."""
    losses = Losses()
    trainer = make_trainer(folder, max_steps=steps, callbacks=[*callbacks, losses])
    trainer.fit(module or tiny_generator(in_pixels=False), TinyData())
    return [float(each) for each in losses.values]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_of(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled, but their code is not generated, which takes long."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compile_(model, backend="eager", **options)
    )


def test_recomputing_activations_changes_no_loss(tmp_path: Path, plain: list[float]) -> None:
    module = tiny_generator(in_pixels=False)
    assert losses_of(tmp_path, Acceleration(activation_checkpointing=True), module=module) == plain
    assert module.denoiser.net.down_blocks[0].gradient_checkpointing
    assert not module.average.model.net.down_blocks[0].gradient_checkpointing  # it has no gradients


def test_channels_last_changes_the_order_in_memory_while_it_trains(
    tmp_path: Path, plain: list[float]
) -> None:
    def in_order(weight: Tensor) -> bool:
        return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()

    class Look(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            for network in (pl_module.denoiser, pl_module.average.model, pl_module.autoencoder):
                assert any(in_order(each) for each in network.parameters() if each.ndim == 4)
            pl_module.save_pretrained(tmp_path / "inside")  # as the choice of an iteration does

    module = tiny_generator(in_pixels=False)
    losses = losses_of(tmp_path, Acceleration(channels_last=True), Look(), module=module)
    assert losses == pytest.approx(plain, rel=1e-5)
    module.save_pretrained(tmp_path / "after")
    module.autoencoder.save(tmp_path / "autoencoder")
    inside, after = (load_file(tmp_path / name / "model.safetensors") for name in ("inside", "after"))
    assert all(torch.equal(inside[name], value) for name, value in after.items())
    assert load_generator(tmp_path / "after").generate(["a"], [0]).shape == (1, 3, 8, 8)


def test_blocks_are_compiled_in_place_and_flops_are_counted_through_them(
    tmp_path: Path, plain: list[float], eager: None
) -> None:
    module, throughput = tiny_generator(in_pixels=False), Throughput()
    names = list(module.state_dict())
    losses = losses_of(tmp_path, throughput, Acceleration(compile_blocks=True), module=module)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert (
        losses_of(tmp_path, Acceleration(compile_blocks=True)) == losses
    )  # bit for bit without the counting
    assert list(module.state_dict()) == names
    compiled = [each for each in module.modules() if each._compiled_call_impl is not None]
    kinds = {type(each).__name__ for each in compiled}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert not any(each in module.average.modules() for each in compiled)
    uncompiled = Throughput()
    losses_of(tmp_path, uncompiled, steps=1)
    assert throughput.flops_per_image == uncompiled.flops_per_image


def test_all_switches_work_together(tmp_path: Path, plain: list[float], eager: None) -> None:
    everything = Acceleration(
        compile_blocks=True, activation_checkpointing=True, channels_last=True, tf32=True
    )
    precision = torch.get_float32_matmul_precision()
    try:
        assert losses_of(tmp_path, everything) == pytest.approx(plain, rel=1e-5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("switch", ["compile_blocks", "activation_checkpointing"])
def test_a_switch_that_nothing_answers_is_named(tmp_path: Path, switch: str) -> None:
    module = tiny_generator(denoiser=SmallTextEncoder(dim=8, num_layers=1, num_heads=2), ema_decay=None)
    with pytest.raises(ValueError, match=f"Acceleration.{switch}: no trained network of DiffusionModule"):
        losses_of(tmp_path, Acceleration(**{switch: True}), module=module)
