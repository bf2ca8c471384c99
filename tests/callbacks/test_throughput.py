"""Speed is measured right, and measuring changes nothing."""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from emu_lightning.callbacks import Acceleration, Throughput
from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.callbacks.throughput import Clock, count_flops, first_sample, measure_matmul_rate
from tests.tiny import EndlessBatches, TinyData, make_batch, make_trainer, tiny_generator


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "speed.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# --- it changes nothing -------------------------------------------------------------------------------------


def trained(folder: Path, callbacks: list[Callback], **arguments) -> tuple[dict[str, Tensor], list[object]]:
    """Weights, and every random state, after six batches."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    module = tiny_generator(in_pixels=False)
    module.text_encoder.layers.layers[0].dropout.p = 0.5  # draws from the global generator
    trainer = make_trainer(folder, max_steps=6 // arguments.get("accumulate_grad_batches", 1), **arguments)
    trainer.callbacks = [*callbacks, *trainer.callbacks]
    trainer.fit(module, TinyData())
    states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    return module.state_dict(), states


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path: Path, accumulate: int) -> None:
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
    weights, states = trained(tmp_path, [], **arguments)
    measured, measured_states = trained(tmp_path, [Throughput()], **arguments)
    assert all(torch.equal(measured[name], value) for name, value in weights.items())
    assert measured_states == states
    assert len(rows(tmp_path)) == 6 // accumulate - 1


# --- it measures --------------------------------------------------------------------------------------------


class SlowBatches(EndlessBatches):
    """A batch takes 50 ms to fetch."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.05)
            yield batch


class SlowData(TinyData):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(SlowBatches(), batch_size=None)


class Slow(Callback):
    """Works for a second after a batch, as one that draws pictures does."""

    def on_train_batch_end(self, *_: object) -> None:
        time.sleep(0.5)


def test_waiting_for_data_counts_and_what_other_callbacks_do_does_not(tmp_path: Path) -> None:
    throughput = Throughput()
    arguments = {"log_every_n_steps": 2, "callbacks": [throughput, Slow()]}
    trainer = make_trainer(tmp_path, max_steps=5, **arguments)
    trainer.fit(tiny_generator(), SlowData())
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]  # loggers number the steps from 0
    last = rows(tmp_path)[-1]
    seconds = 4 / last["speed/images_per_second_per_device"]  # of a batch of four
    assert seconds >= 0.05
    assert last["speed/data_wait"] * seconds == pytest.approx(0.05, rel=0.2)
    assert 8 / (2 * seconds + 2 * 0.5) < last["speed/images_per_second_per_device"]
    assert throughput.flops_per_image is not None and throughput.matmul_rate is not None
    mfu = throughput.flops_per_image * last["speed/images_per_second_per_device"] / throughput.matmul_rate
    assert last["speed/mfu"] == pytest.approx(mfu) and 0 < mfu < 1
    assert 0.01 < last["speed/peak_memory_gb"] < 1000
    assert "TFLOP/s measured" in throughput.summary()


class LossesOnly(LightningModule):
    """Has no loss that can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_where_the_flops_cannot_be_counted_there_is_no_mfu_but_a_reason(tmp_path: Path) -> None:
    throughput = Throughput()
    trainer = make_trainer(tmp_path, max_steps=3, log_every_n_steps=1, callbacks=[throughput])
    trainer.fit(LossesOnly(), TinyData())
    assert "speed/mfu" not in rows(tmp_path)[0]
    assert "no MFU (ValueError: the losses of LossesOnly are not counted)" in throughput.summary()


def test_a_resumed_run_goes_on_in_the_file_and_other_loggers_get_the_rows(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for max_steps in (4, 6):
        arguments = {"log_every_n_steps": 1, "logger": metrics, "callbacks": [Throughput()]}
        trainer = make_trainer(tmp_path, max_steps=max_steps, **arguments)
        trainer.fit(tiny_generator(), TinyData(), ckpt_path=tmp_path / "a.ckpt" if max_steps > 4 else None)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 5]  # the first step of each start is left out
    assert "speed" not in metrics.path.read_text()  # which is a function of the seed


# --- FLOPs --------------------------------------------------------------------------------------------------


def test_a_linear_layer_has_six_flops_a_weight_and_sample() -> None:
    layer = nn.Linear(7, 5)
    x = torch.randn(3, 7, requires_grad=True)
    assert count_flops(lambda: layer(x).sum()) == 6 * 3 * 7 * 5
    assert count_flops(lambda: layer(x.detach()).sum()) == 4 * 3 * 7 * 5  # no gradient for the data


def test_a_convolution_has_six_flops_a_weight_and_pixel() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert count_flops(lambda: layer(x).sum()) == 6 * 2 * 64 * 4 * 6 * 9


def test_the_kernel_of_attention_does_not_change_the_count() -> None:
    """Fused attention computes the scores again in its backward pass: two products forward, four back."""
    q, k, v = (torch.randn(2, 3, 10, 8, requires_grad=True) for _ in range(3))
    fused = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum())
    plain = count_flops(lambda: ((q @ k.mT / 8**0.5).softmax(-1) @ v).sum())
    assert fused == plain == 6 * (2 * 2 * 3 * 10 * 10 * 8)


def counted(tmp_path: Path, *callbacks: Callback, steps: int = 1) -> float | None:
    throughput = Throughput()
    trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[throughput, *callbacks])
    trainer.fit(tiny_generator(in_pixels=False), TinyData())
    return throughput.flops_per_image


def test_what_is_counted_is_an_image_of_the_real_loss(tmp_path: Path) -> None:
    """The trained networks forward and backward and the frozen autoencoder, of any batch; nothing twice."""
    module, batch = tiny_generator(in_pixels=False), make_batch(0, texts=["a box"])
    whole = count_flops(lambda: module.loss(batch, torch.Generator().manual_seed(0)))
    sample = count_flops(lambda: module.loss(first_sample(batch), torch.Generator().manual_seed(0)))
    assert sample == pytest.approx(whole / len(batch))
    flops = counted(tmp_path)
    assert flops is not None and flops > sample / 2  # of another caption
    assert counted(tmp_path, Acceleration(activation_checkpointing=True)) == flops


def test_the_rate_of_matrix_products_is_that_of_the_precision() -> None:
    clock = Clock(torch.device("cpu"))
    state = torch.get_rng_state()
    assert 1e8 < measure_matmul_rate(clock) < 1e14
    assert torch.equal(torch.get_rng_state(), state)
