"""Generators, batches and trainers so small that a test runs them in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from emu_lightning.data.batch import Batch
from emu_lightning.models import Autoencoder, PixelUNet, SmallTextEncoder, UNet
from emu_lightning.modules import DiffusionModule, SuperResolutionModule
from emu_lightning.processes import Diffusion

CAPTIONS = ("a red ball in the snow", "a blue star at night", "one green ring, on a beach", "a box")


def tiny_autoencoder(seed: int = 0) -> Autoencoder:
    """f2, four latent channels; latents that are not normalised by chance."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder(4, (8, 16), norm_groups=4, use_mid_attention=False)
    autoencoder.measure_latents([make_batch(0).images])
    return autoencoder.eval()


def tiny_unet(in_channels: int = 3, **arguments: Any) -> UNet:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_channels": (8, 16),
        "transformer_layers": (0, 1),
        "head_dim": 8,
        "sequence_dim": 8,
        "pooled_dim": 8,
        "norm_groups": 4,
    }
    return UNet(in_channels, **{**defaults, **arguments})


def tiny_text() -> SmallTextEncoder:
    return SmallTextEncoder(dim=8, num_layers=1, num_heads=2, max_length=16, embedding_dim=2)


def tiny_generator(seed: int = 0, in_pixels: bool = True, **arguments: Any) -> DiffusionModule:
    """Pictures of 8 pixels, in pixels or in the latents of a tiny autoencoder."""
    autoencoder = None if in_pixels else tiny_autoencoder(seed)
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "denoiser": tiny_unet(3 if in_pixels else 4),
        "text_encoder": tiny_text(),
        "process": Diffusion(),
        "autoencoder": autoencoder,
        "image_size": 8,
        "num_steps": 3,
        "guidance_scale": 2.0,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return DiffusionModule(**{**defaults, **arguments})


def tiny_upsampler(seed: int = 0, **arguments: Any) -> SuperResolutionModule:
    """Pictures of 8 pixels to pictures of 16."""
    torch.manual_seed(seed)
    denoiser = PixelUNet(
        block_channels=(8, 16), head_dim=8, sequence_dim=8, pooled_dim=8, norm_groups=4,
        use_low_resolution=True, level_dim=8,
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "denoiser": denoiser,
        "text_encoder": tiny_text(),
        "process": Diffusion(),
        "factor": 2,
        "image_size": 16,
        "num_steps": 2,
        "guidance_scale": 2.0,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return SuperResolutionModule(**{**defaults, **arguments})


def make_batch(position: int, size: int = 4, side: int = 8, texts: Sequence[str] = CAPTIONS) -> Batch:
    """Random images; a function of the arguments."""
    images = torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(position)) * 2 - 1
    sizes = torch.full((size, 2), side)
    captions = [texts[index % len(texts)] for index in range(size)]
    return Batch(images, None, captions, sizes, sizes * 0, sizes, [f"{position}"] * size, position)


class EndlessBatches(IterableDataset):
    """Batches of growing position, as a training loader gives them."""

    def __iter__(self):
        position = 0
        while True:
            yield make_batch(position)
            position += 4


class TinyData(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(EndlessBatches(), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([make_batch(0)], batch_size=None)


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    """A Trainer that writes nothing, counts optimizer steps and does not validate before it trains."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**{**defaults, **arguments})
