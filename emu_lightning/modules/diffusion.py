"""Text-conditioned diffusion, in the latents of an autoencoder or, without one, in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from emu_lightning.data.batch import Batch
from emu_lightning.models import EMA, Autoencoder, Denoiser, FrozenTextEncoder, Text, TextEncoder
from emu_lightning.modules.generator import (
    Description,
    Generator,
    Learner,
    class_path,
    describe,
    load_weights,
)
from emu_lightning.optimizers import AdamW
from emu_lightning.processes import Process, guided
from emu_lightning.processes.seeding import Rng, picture_generators, uniform

D = TypeVar("D", bound=Denoiser)
DECODE_PIXELS = 2 * 1024**2  # of the pictures decoded at once: each of 1024 x 1024 takes gigabytes in float32


def encode_text(encoder: TextEncoder, batch: Batch, is_dropped: Tensor) -> Text:
    """Text of a batch, "" where ``is_dropped`` (B,) says so, from cached embeddings where there are any."""
    if batch.embeddings is None:
        dropped = is_dropped.tolist()
        return encoder(["" if drop else text for text, drop in zip(batch.texts, dropped, strict=True)])
    if not isinstance(encoder, FrozenTextEncoder) or batch.empty_embeddings is None:
        raise ValueError(
            f"cached text embeddings are of no use to {type(encoder).__name__}, which is trained: "
            "leave data.cache_text out"
        )
    mixed = {
        name: torch.where(is_dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), empty, value)
        for (name, value), empty in zip(
            batch.embeddings.items(), batch.empty_embeddings.values(), strict=True
        )
    }
    return encoder.read(mixed)


def denoising_loss(
    denoise: Callable[[Tensor, Tensor], Tensor], process: Process, x_0: Tensor, rng: Rng
) -> Tensor:
    """Weighted mean squared error of what ``denoise`` predicts of (x_t, t), at random times and noise."""
    t = process.sample_t(len(x_0), rng, x_0.device)
    noise = process.noise_like(x_0, rng)
    prediction = denoise(process.corrupt(x_0, noise, t), t)
    error = (prediction.float() - process.target(x_0, noise, t)).square().mean((1, 2, 3))
    return (process.loss_weight(t) * error).mean()


class DenoisingLearner(Learner, Generic[D]):
    """What diffusion in latents, in pixels and from small images to large ones shares: a denoiser under text,
    its average, a process, and how they are stored."""

    def __init__(
        self,
        denoiser: D,
        text_encoder: TextEncoder,
        process: Process,
        image_size: int,
        text_dropout: float,
        train_text_encoder: bool,
        ema_decay: float | None,
        num_steps: int,
        guidance_scale: float,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self.denoiser, self.text_encoder, self.process = denoiser, text_encoder, process
        self.text_encoder.requires_grad_(train_text_encoder)
        self.average = EMA(denoiser, ema_decay) if ema_decay is not None else None
        self.image_size, self.text_dropout, self.train_text_encoder = (
            image_size,
            text_dropout,
            train_text_encoder,
        )
        self.ema_decay, self.num_steps, self.guidance_scale = ema_decay, num_steps, guidance_scale

    def frozen_text(self) -> FrozenTextEncoder | None:
        return self.text_encoder if isinstance(self.text_encoder, FrozenTextEncoder) else None

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.denoiser.parameters()
        if self.train_text_encoder:
            yield from self.text_encoder.parameters()

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update(self.denoiser)

    @property
    def sampling_denoiser(self) -> D:
        """The average, where there is one."""
        return self.denoiser if self.average is None else self.average.model

    def describe(self) -> Description:
        return {
            "class_path": class_path(type(self)),
            "init_args": {
                "denoiser": describe(self.denoiser),
                "text_encoder": describe(self.text_encoder),
                "process": self.process.describe(),
                "image_size": self.image_size,
                "text_dropout": self.text_dropout,
                "train_text_encoder": self.train_text_encoder,
                "ema_decay": self.ema_decay,
                "num_steps": self.num_steps,
                "guidance_scale": self.guidance_scale,
            },
        }

    def sampling_state(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("average.")}
        return state | {
            f"denoiser.{name}": value for name, value in self.sampling_denoiser.state_dict().items()
        }

    def load_sampling_state(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        own = {name: value for name, value in state.items() if not name.startswith("average.")}
        averaged = {
            name.replace("average.model.", "denoiser.", 1): value
            for name, value in state.items()
            if name.startswith("average.model.")
        }
        missing, unexpected = self.load_state_dict(own | averaged, strict=False)
        if self.average is not None:
            self.average.restart(self.denoiser)
        return [name for name in missing if not name.startswith("average.")], list(unexpected)


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
            text_encoder,
            process,
            image_size,
            text_dropout,
            train_text_encoder,
            ema_decay,
            num_steps,
            guidance_scale,
            optimizer,
            lr_scheduler,
            seed,
        )
        self.autoencoder = autoencoder.requires_grad_(False) if autoencoder is not None else None
        if init_from is not None:
            load_weights(self, init_from)

    # --- training -------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """Weighted mean squared error of the prediction."""
        x_0 = self._latents(batch, rng)
        text = encode_text(self.text_encoder, batch, uniform(len(batch), rng) < self.text_dropout)
        size = torch.cat([batch.original_size, batch.crop, batch.target_size], 1).to(x_0)
        denoiser = self.denoiser if self.training else self.sampling_denoiser
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
            size, denoiser = self._generation_size(), self.sampling_denoiser
            denoise = guided(lambda x_t, t, text: denoiser(x_t, t, text, size), text, uncond, scale)
            rng, steps = picture_generators(seeds), self.num_steps if num_steps is None else num_steps
            x_0 = self.process.sample(denoise, self._shape(len(prompts)), steps, rng, self.device)
            if self.autoencoder is not None:
                parts = x_0.split(max(1, DECODE_PIXELS // self.image_size**2))
                x_0 = torch.cat([self.autoencoder.decode(part) for part in parts])
            return x_0.float().clamp(-1, 1)

    def _shape(self, num: int) -> tuple[int, int, int, int]:
        side = self.image_size // (1 if self.autoencoder is None else self.autoencoder.downsampling)
        return num, self.denoiser.config.in_channels, side, side

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
