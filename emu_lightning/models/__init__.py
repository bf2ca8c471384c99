"""Networks: tensors in, tensors out."""

from emu_lightning.models.autoencoder import Autoencoder, load_autoencoder
from emu_lightning.models.denoiser import Denoiser
from emu_lightning.models.discriminator import PatchDiscriminator
from emu_lightning.models.ema import EMA
from emu_lightning.models.encoders import ClipText, JointTextEncoder, OpenClipText, SingleTextEncoder, T5Text
from emu_lightning.models.fourier import FourierFeatures
from emu_lightning.models.frozen import Frozen
from emu_lightning.models.lora import Lora
from emu_lightning.models.masked_transformer import MaskedTransformer
from emu_lightning.models.perceptual import FeatureNetwork, PooledFeatures, RandomFeatures, TimmFeatures
from emu_lightning.models.pipeline_vae import PipelineVAE
from emu_lightning.models.pixel_unet import PixelUNet
from emu_lightning.models.pretrained import Pretrained
from emu_lightning.models.text import FrozenTextEncoder, SmallTextEncoder, Text, TextEncoder
from emu_lightning.models.unet import UNet
from emu_lightning.models.vq import VQAutoencoder, load_vq_autoencoder

__all__ = [
    "EMA",
    "Autoencoder",
    "ClipText",
    "Denoiser",
    "FeatureNetwork",
    "FourierFeatures",
    "Frozen",
    "FrozenTextEncoder",
    "JointTextEncoder",
    "Lora",
    "MaskedTransformer",
    "OpenClipText",
    "PatchDiscriminator",
    "PipelineVAE",
    "PixelUNet",
    "PooledFeatures",
    "Pretrained",
    "RandomFeatures",
    "SingleTextEncoder",
    "SmallTextEncoder",
    "T5Text",
    "Text",
    "TextEncoder",
    "TimmFeatures",
    "UNet",
    "VQAutoencoder",
    "load_autoencoder",
    "load_vq_autoencoder",
]
