"""The smallest stage there is: one linear layer, data that never ends, noise by (seed, step)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from emu_lightning.data.batch import Batch


class Denoiser(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)


class ToyModule(LightningModule):
    def __init__(
        self,
        denoiser: Denoiser,
        latent_channels: Literal[4, 8, 16] = 4,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        seconds_per_step: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.denoiser = denoiser
        self.latent_channels = latent_channels
        self.optimizer = optimizer
        self.seconds_per_step = seconds_per_step
        self.ended: Tensor  # changes after the last step, as the autoencoder's measured latents do
        self.register_buffer("ended", torch.tensor(False))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(self.seconds_per_step)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(self.global_step))
        loss = (self.denoiser.layer(noise) - 1).square().mean()
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.denoiser.layer(batch.latents).mean(), batch_size=len(batch))

    def on_train_end(self) -> None:
        self.ended.fill_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class OtherModule(ToyModule):
    """Another stage, to be confused with the first."""


class EndlessZeros(IterableDataset):
    def __init__(self, width: int, batch_size: int) -> None:
        self.width = width
        self.batch_size = batch_size

    def batch(self) -> Batch:
        sizes = torch.zeros(self.batch_size, 2, dtype=torch.int64)
        names = [""] * self.batch_size
        return Batch(None, torch.zeros(self.batch_size, self.width), names, sizes, sizes, sizes, names)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch()


class ToyData(LightningDataModule):
    def __init__(self, width: int = 3, batch_size: int = 2) -> None:
        super().__init__()
        self.zeros = EndlessZeros(width, batch_size)

    def train_dataloader(self) -> Iterable[Batch]:
        return DataLoader(self.zeros, batch_size=None)

    def val_dataloader(self) -> Iterable[Batch]:
        return DataLoader([self.zeros.batch()], batch_size=None)
