"""Masked generation of a VQ autoencoder's ids from text, as Muse has it (Chang et al. 2023)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import interpolate

from emu_lightning.data.batch import Batch
from emu_lightning.models import MaskedTransformer, TextEncoder, VQAutoencoder
from emu_lightning.modules.generator import Description, Generator, Upsampler, describe, load_weights
from emu_lightning.modules.text_learner import DECODE_PIXELS, TextLearner, encode_text
from emu_lightning.optimizers import AdamW
from emu_lightning.processes.masking import decode, guided_logits, masked_cross_entropy, random_mask
from emu_lightning.processes.seeding import Rng, picture_generators


class MaskedLearner(TextLearner[MaskedTransformer]):
    """What the base and the super-resolution stage share: all but where the low-resolution ids come from.

    Args:
        transformer: predicts hidden ids; its side and codebook are those of `vq`.
        text_encoder: trained along with the transformer where ``train_text_encoder``.
        vq: frozen; between images and ids.
        text_dropout: share of captions replaced by "" so that guidance has an unconditional model.
        ema_decay: of the transformer's average; None keeps none. Not given by the paper.
        num_steps: default of sampling.
        guidance_scale: of the last step, default of sampling; rises linearly from 1. A choice.
        temperature: see `processes.masking.decode`. A choice.
        optimizer, lr_scheduler: the schedule is stepped once an optimizer step.
        seed: of masks and text dropout.

    Raises:
        ValueError: transformer and VQ autoencoder have codebooks of different size.
    """

    network_name = "transformer"

    def __init__(
        self,
        transformer: MaskedTransformer,
        text_encoder: TextEncoder,
        vq: VQAutoencoder,
        text_dropout: float = 0.1,
        train_text_encoder: bool = True,
        ema_decay: float | None = 0.999,
        num_steps: int = 24,
        guidance_scale: float = 3.0,
        temperature: float = 4.5,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        _require_same("codebook_size", transformer.config.codebook_size, vq.config.codebook_size)
        transformer.start_from_codes(vq.codebook.weight)
        super().__init__(
            transformer,
            text_encoder,
            text_dropout,
            train_text_encoder,
            ema_decay,
            num_steps,
            guidance_scale,
            optimizer,
            lr_scheduler,
            seed,
        )
        self.vq, self.temperature = vq.requires_grad_(False), temperature
        self.image_size = transformer.config.side * vq.downsampling

    # --- training -------------------------------------------------------------------------------------------

    @abstractmethod
    def _low_ids(self, batch: Batch) -> Tensor | None:
        """What else than text the transformer is shown of a training batch."""

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """Cross-entropy of the hidden ids, nats per id."""
        ids, low_ids = self._ids(batch), self._low_ids(batch)
        text = encode_text(self.text_encoder, batch, self.text_dropout, rng)
        mask = random_mask(ids.shape[0], ids.shape[1], rng)
        logits = self.loss_network(ids.masked_fill(mask, self.network.mask_id), text, low_ids)
        return masked_cross_entropy(logits, ids, mask)

    @torch.no_grad()
    def _ids(self, batch: Batch) -> Tensor:
        """Ids (B, N) of a batch's pictures, or of its cached latents."""
        latents = batch.latents
        if latents is None:
            assert batch.images is not None  # a batch holds one of the two
            latents = self.vq.encode(batch.images)
        ids = self.vq.ids(latents).flatten(1)
        if ids.shape[1] != self.network.num_ids:
            raise ValueError(
                f"pictures of {ids.shape[1]} ids, but the transformer has {self.network.num_ids}: set "
                f"data.resolution to {self.image_size}"
            )
        return ids

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vq.encode(images).float()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.vq.eval()
        return self

    # --- sampling -------------------------------------------------------------------------------------------

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int | None,
        guidance_scale: float | None,
        negative_prompt: str,
        low_ids: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        steps = self.num_steps if num_steps is None else num_steps
        transformer, num_ids, num = self.sampling_network, self.network.num_ids, len(prompts)
        cond = self.text_encoder(list(prompts))
        uncond = self.text_encoder([negative_prompt] * num)
        predict = guided_logits(
            lambda ids, text: transformer(ids, text, _as_often(low_ids, ids)), cond, uncond, scale
        )
        rng, mask_id = picture_generators(seeds), self.network.mask_id
        ids = decode(predict, num, num_ids, mask_id, steps, self.temperature, rng, self.device)
        side = self.network.config.side
        parts = ids.view(num, side, side).split(max(1, DECODE_PIXELS // self.image_size**2))
        return torch.cat([self.vq.decode_ids(part) for part in parts]).float().clamp(-1, 1)

    # --- handing over ---------------------------------------------------------------------------------------

    def describe(self) -> Description:
        description = super().describe()
        description["init_args"] |= {"vq": describe(self.vq), "temperature": self.temperature}
        return description


class MaskedModule(MaskedLearner, Generator):
    """A masked transformer over the ids of a VQ autoencoder, drawing pictures from text.

    Args:
        init_from: generator folder or checkpoint of the same networks whose weights training starts from.
        kwargs: of :class:`MaskedLearner`.
    """

    def __init__(self, init_from: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if init_from is not None:
            load_weights(self, init_from)

    def _low_ids(self, batch: Batch) -> None:
        return None

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
            return self._draw(prompts, seeds, num_steps, guidance_scale, negative_prompt)


class MaskedSuperResolutionModule(MaskedLearner, Upsampler):
    """A masked transformer over the ids of large pictures, given text and the ids of the small ones.

    Muse hands the ids themselves from stage to stage. Here stages meet as pictures, so that any can follow
    any, and the small picture is encoded again: docs/masked_transformer.md says how many ids survive that.

    Args:
        transformer: predicts hidden ids; its low side and codebook are those of `low_vq`.
        low_vq: frozen; from small images to their ids.
        num_steps: default of sampling; 8 are Muse's.
        kwargs: of :class:`MaskedLearner`.

    Raises:
        ValueError: a transformer and a VQ autoencoder have codebooks of different size.
    """

    def __init__(
        self, transformer: MaskedTransformer, low_vq: VQAutoencoder, num_steps: int = 8, **kwargs: Any
    ) -> None:
        config = transformer.config
        _require_same("low_codebook_size", config.low_codebook_size, low_vq.config.codebook_size)
        transformer.start_low_from_codes(low_vq.codebook.weight)
        super().__init__(transformer=transformer, num_steps=num_steps, **kwargs)
        self.low_vq = low_vq.requires_grad_(False)
        self.low_size = config.low_side * low_vq.downsampling
        self.factor, self.side_multiple = self.image_size // self.low_size, self.image_size

    def _low_ids(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise ValueError(
                "super-resolution learns from images, not from cached latents: leave data.latents_from out"
            )
        side = self.image_size // self.factor
        small = interpolate(batch.images, (side, side), mode="bicubic", antialias=True)
        return self._encode_low(small.clamp(-1, 1))

    @torch.no_grad()
    def _encode_low(self, images: Tensor) -> Tensor:
        return self.low_vq.ids(self.low_vq.encode(images)).flatten(1)

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Iterable[int],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        made, low = (self.image_size,) * 2, (self.low_size,) * 2
        if images.shape[-2:] != low or size not in (None, made):
            raise ValueError(
                f"a masked transformer knows one size: it makes {made} pixels of {low}, not "
                f"{size or made} of {tuple(images.shape[-2:])}; resize the images"
            )
        with self.evaluating():
            low_ids = self._encode_low(images)
            return self._draw(prompts, seeds, num_steps, guidance_scale, negative_prompt, low_ids)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.low_vq.eval()
        return self

    def describe(self) -> Description:
        description = super().describe()
        description["init_args"]["low_vq"] = describe(self.low_vq)
        return description


def _as_often(low_ids: Tensor | None, ids: Tensor) -> Tensor | None:
    """The low-resolution ids once for each pass of guidance."""
    return None if low_ids is None else low_ids.repeat(len(ids) // len(low_ids), 1)


def _require_same(name: str, of_transformer: int | None, of_vq: int) -> None:
    if of_transformer != of_vq:
        raise ValueError(
            f"the transformer's {name} is {of_transformer}, but the VQ autoencoder has {of_vq} codes: give "
            "the same"
        )
