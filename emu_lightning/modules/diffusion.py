"""Text-conditioned diffusion, in the latents of an autoencoder or, without one, in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emu_lightning.data.batch import Batch
from emu_lightning.models import Autoencoder, Denoiser, TextEncoder
from emu_lightning.modules.generator import Description, Generator, describe, load_weights
from emu_lightning.modules.text_learner import DECODE_PIXELS, TextLearner, encode_text
from emu_lightning.optimizers import AdamW
from emu_lightning.processes import Process, guided
from emu_lightning.processes.seeding import Rng, picture_generators

D = TypeVar("D", bound=Denoiser)


def denoising_loss(
    denoise: Callable[[Tensor, Tensor], Tensor], process: Process, x_0: Tensor, rng: Rng
) -> Tensor:
    """Weighted mean squared error of what ``denoise`` predicts of (x_t, t), at random times and noise."""
    t = process.sample_t(len(x_0), rng, x_0.device)
    noise = process.noise_like(x_0, rng)
    prediction = denoise(process.corrupt(x_0, noise, t), t)
    error = (prediction.float() - process.target(x_0, noise, t)).square().mean((1, 2, 3))
    return (process.loss_weight(t) * error).mean()


class DenoisingLearner(TextLearner[D]):
    """What diffusion in latents, in pixels and from small images to large ones shares."""

    network_name = "denoiser"

    def __init__(self, denoiser: D, process: Process, image_size: int, **kwargs: Any) -> None:
        super().__init__(denoiser, **kwargs)
        self.process, self.image_size = process, image_size

    def describe(self) -> Description:
        description = super().describe()
        description["init_args"] |= {"process": self.process.describe(), "image_size": self.image_size}
        return description


class DiffusionModule(DenoisingLearner[Denoiser], Generator):
    """A denoiser of latents under text, with a Gaussian process, guidance and an average of the denoiser.

    Args:
        denoiser: predicts the process's target from (x_t, t, text, size).
        text_encoder: trained along with the denoiser where ``train_text_encoder``.
        process: corruption, target, loss weight and sampling.
        autoencoder: frozen; None is diffusion in pixels.
        init_from: generator folder or checkpoint of the same networks whose weights training starts from,
            such as the stage before at a lower resolution; None starts anew.
        image_size: side of generated pictures, pixels.
        text_dropout: share of captions replaced by "" so that guidance has an unconditional model (Ho &
            Salimans 2022). The paper gives none; 0.1 is the field's custom.
        ema_decay: of the denoiser's average; None keeps none. Not given by the paper.
        num_steps, guidance_scale: defaults of ``generate``. Not given by the paper.
        optimizer, lr_scheduler: the schedule is stepped once an optimizer step.
        seed: of noise, times and text dropout.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        text_encoder: TextEncoder,
        process: Process,
        autoencoder: Autoencoder | None = None,
        init_from: str | None = None,
        image_size: int = 64,
        text_dropout: float = 0.1,
        train_text_encoder: bool = True,
        ema_decay: float | None = 0.999,
        num_steps: int = 25,
        guidance_scale: float = 3.0,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            denoiser,
            process,
            image_size,
            text_encoder=text_encoder,
            text_dropout=text_dropout,
            train_text_encoder=train_text_encoder,
            ema_decay=ema_decay,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            seed=seed,
        )
        self.autoencoder = autoencoder.requires_grad_(False) if autoencoder is not None else None
        if init_from is not None:
            load_weights(self, init_from)

    # --- training -------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """Weighted mean squared error of the prediction."""
        x_0 = self._latents(batch, rng)
        text = encode_text(self.text_encoder, batch, self.text_dropout, rng)
        size = torch.cat([batch.original_size, batch.crop, batch.target_size], 1).to(x_0)
        denoiser = self.loss_network
        return denoising_loss(lambda x_t, t: denoiser(x_t, t, text, size), self.process, x_0, rng)

    def _latents(self, batch: Batch, rng: Rng) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None  # a batch holds one of the two
        if self.autoencoder is None:
            return batch.images
        with torch.no_grad():
            return self.autoencoder.encode(batch.images, rng).float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return images if self.autoencoder is None else self.autoencoder.encode(images).float()

    def train(self, mode: bool = True) -> DiffusionModule:
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    # --- sampling -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Tensor:
        with self.evaluating():
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            text = self.text_encoder(list(prompts))
            uncond = self.text_encoder([negative_prompt] * len(prompts))
            size, denoiser = self._generation_size(), self.sampling_network
            denoise = guided(lambda x_t, t, text: denoiser(x_t, t, text, size), text, uncond, scale)
            rng, steps = picture_generators(seeds), self.num_steps if num_steps is None else num_steps
            x_0 = self.process.sample(denoise, self._shape(len(prompts)), steps, rng, self.device)
            if self.autoencoder is not None:
                parts = x_0.split(max(1, DECODE_PIXELS // self.image_size**2))
                x_0 = torch.cat([self.autoencoder.decode(part) for part in parts])
            return x_0.float().clamp(-1, 1)

    def _shape(self, num: int) -> tuple[int, int, int, int]:
        side = self.image_size // (1 if self.autoencoder is None else self.autoencoder.downsampling)
        return num, self.network.config.in_channels, side, side

    def _generation_size(self) -> Tensor:
        """SDXL's conditioning (original, crop, target) of an uncropped picture at its own size, (1, 6)."""
        side = float(self.image_size)
        return torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device)

    # --- handing over ---------------------------------------------------------------------------------------

    def describe(self) -> Description:
        description = super().describe()
        autoencoder = None if self.autoencoder is None else describe(self.autoencoder)
        description["init_args"]["autoencoder"] = autoencoder
        return description
