"""LightningModules: what is trained, with which loss and optimizer."""

from emu_lightning.modules.autoencoder import AutoencoderModule
from emu_lightning.modules.diffusion import DiffusionModule
from emu_lightning.modules.generator import (
    Generator,
    Upsampler,
    load_generator,
    load_learner,
    load_upsampler,
    weights_sha256,
)
from emu_lightning.modules.pipeline import PipelineModule
from emu_lightning.modules.quality_tuning import QualityTuningModule

__all__ = [
    "AutoencoderModule",
    "DiffusionModule",
    "Generator",
    "PipelineModule",
    "QualityTuningModule",
    "Upsampler",
    "load_generator",
    "load_learner",
    "load_upsampler",
    "weights_sha256",
]
