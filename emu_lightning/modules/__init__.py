"""LightningModules: what is trained, with which loss and optimizer."""

from emu_lightning.modules.autoencoder import AutoencoderModule
from emu_lightning.modules.cascade import CascadeModule
from emu_lightning.modules.contrastive import ContrastiveModule
from emu_lightning.modules.diffusion import DiffusionModule
from emu_lightning.modules.generator import (
    Generator,
    Upsampler,
    load_generator,
    load_learner,
    load_upsampler,
    weights_sha256,
)
from emu_lightning.modules.masked import MaskedModule, MaskedSuperResolutionModule
from emu_lightning.modules.pipeline import PipelineModule
from emu_lightning.modules.quality_tuning import QualityTuningModule
from emu_lightning.modules.super_resolution import SuperResolutionModule
from emu_lightning.modules.vq_autoencoder import VQAutoencoderModule

__all__ = [
    "AutoencoderModule",
    "CascadeModule",
    "ContrastiveModule",
    "DiffusionModule",
    "Generator",
    "MaskedModule",
    "MaskedSuperResolutionModule",
    "PipelineModule",
    "QualityTuningModule",
    "SuperResolutionModule",
    "Upsampler",
    "VQAutoencoderModule",
    "load_generator",
    "load_learner",
    "load_upsampler",
    "weights_sha256",
]
