"""A super-resolution stage of a pixel-diffusion cascade."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import interpolate

from emu_lightning.data.batch import Batch
from emu_lightning.models import PixelUNet, Text, TextEncoder
from emu_lightning.modules.diffusion import DenoisingLearner, denoising_loss
from emu_lightning.modules.generator import Description, Upsampler, load_weights
from emu_lightning.modules.text_learner import encode_text
from emu_lightning.optimizers import AdamW
from emu_lightning.processes import Diffusion, guided
from emu_lightning.processes.gaussian import offset_noise
from emu_lightning.processes.seeding import Rng, integers, picture_generators, uniform


class SuperResolutionModule(DenoisingLearner[PixelUNet], Upsampler):
    """Diffusion of large images under the small ones and their text (Ho et al. 2022, Saharia et al. 2022).

    Noise-conditioning augmentation (Ho et al. 2022, section 4): in training the small images are corrupted by
    the stage's own process at a level s ~ U(0, ``max_level``) that the network is told, so that it does not
    trust them to the last pixel; a cascade's base makes pictures that differ from photographs made small.

    Args:
        denoiser: with ``use_low_resolution``.
        text_encoder, process, text_dropout, train_text_encoder, ema_decay, optimizer, lr_scheduler, seed: as
            for :class:`~emu_lightning.modules.diffusion.DiffusionModule`.
        init_from: upsampler folder or checkpoint whose weights training starts from; None starts anew.
        factor: how many times larger the images become, per side. Imagen's two stages have 4.
        image_size: side of what the stage makes in a cascade, pixels.
        crop_size: side of the random crops it learns from, pixels, a multiple of ``factor``; None takes whole
            images. Imagen trains its last stage on crops of 256 pixels and samples 1024.
        max_level: of the augmentation in training; Imagen's is 1.
        residual_std: about how far a large image is from its enlarged small one, in [-1, 1] units. The
            network then learns only what the small image and x_t together do not say (:meth:`_predict`), and
            needs few steps; None, as Imagen, has it learn all.
        augmentation_level: s in sampling. Imagen sweeps it: too low leaves the small picture's artefacts, too
            high invents.
        num_steps, guidance_scale: defaults of ``upsample``. Not given by the paper.

    Raises:
        ValueError: the denoiser is none of a super-resolution stage, or an argument is out of its range.
    """

    low_size = None  # any size will do
    process: Diffusion

    def __init__(
        self,
        denoiser: PixelUNet,
        text_encoder: TextEncoder,
        process: Diffusion,
        init_from: str | None = None,
        factor: int = 4,
        image_size: int = 256,
        crop_size: int | None = None,
        max_level: float = 1.0,
        augmentation_level: float = 0.1,
        residual_std: float | None = None,
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
        if not denoiser.config.use_low_resolution:
            raise ValueError("a super-resolution stage needs a denoiser with use_low_resolution: true")
        for name, side in {"image_size": image_size, "crop_size": crop_size or factor}.items():
            if side % factor:
                raise ValueError(f"{name}={side} is not a multiple of factor={factor}")
        for name, level in {"max_level": max_level, "augmentation_level": augmentation_level}.items():
            if not 0 <= level <= 1:
                raise ValueError(f"{name}={level} is not in [0, 1]")
        self.factor, self.crop_size, self.side_multiple = factor, crop_size, denoiser.side_multiple
        self.max_level, self.augmentation_level = max_level, augmentation_level
        self.residual_std = residual_std
        if init_from is not None:
            load_weights(self, init_from)

    def loss(self, batch: Batch, rng: Rng) -> Tensor:
        """Weighted mean squared error of the prediction, given images (B, 3, H, W) made small."""
        if batch.images is None:
            raise ValueError("super-resolution learns from images, but the data gives latents: do not cache")
        text = encode_text(self.text_encoder, batch, self.text_dropout, rng)
        images, small = self._crop(batch.images, self._reduce(batch.images), rng)
        level = self.max_level * uniform(len(batch), rng).to(images)
        small = self._augment(small, level, rng)
        denoiser = self.loss_network

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self._predict(denoiser, x_t, t, text, small, level)

        return denoising_loss(denoise, self.process, images, rng)

    def _predict(
        self, denoiser: PixelUNet, x_t: Tensor, t: Tensor, text: Text, small: Tensor, level: Tensor
    ) -> Tensor:
        """The stage's prediction at x_t (B, 3, H, W), given small images corrupted at ``level`` (B,).

        With ``residual_std`` d the enlarged small image m is the mean and d the standard deviation of what is
        looked for, as the data's are in Karras et al. 2022 (EDM, section 5): with r = x_t - alpha m,

            x_0   = m + (alpha d^2 r + sigma d sqrt(v) F) / v      v = alpha^2 d^2 + sigma^2
            noise =     (sigma r     - alpha d sqrt(v) F) / v      F the network's output

        of which F = 0 is the best linear estimate.
        """
        output = denoiser(x_t, t, text, low_resolution=small, level=level)
        if self.residual_std is None:
            return output
        alpha, sigma = self.process.alpha_sigma(t)
        kept, added = self.process.alpha_sigma(level)  # small = kept * clean + added * noise
        mean = interpolate(small / kept, x_t.shape[-2:], mode="bicubic")
        deviation = (self.residual_std**2 + (added / kept).square()).sqrt()
        residual, variance = x_t - alpha * mean, (alpha * deviation).square() + sigma.square()
        correction = deviation * variance.sqrt() * output.float()
        x_0 = mean + (alpha * deviation.square() * residual + sigma * correction) / variance
        noise = (sigma * residual - alpha * correction) / variance
        return self.process.target(x_0, noise, t)

    def _reduce(self, images: Tensor) -> Tensor:
        """The images (B, 3, H, W) smaller by the factor, antialiased."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height}x{width}: their sides must be multiples of factor={self.factor}"
            )
        sides = (height // self.factor, width // self.factor)
        return interpolate(images, sides, mode="bicubic", antialias=True).clamp(-1, 1)

    def _crop(self, images: Tensor, small: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """The same random place of each large and small image. Reduced before it is cropped, a small image
        knows what lies beyond the crop's edge, as it does in sampling."""
        if self.crop_size is None:
            return images, small
        side = self.crop_size // self.factor
        rows, columns = (small.shape[axis] - side + 1 for axis in (2, 3))
        if min(rows, columns) < 1:
            height, width = images.shape[-2:]
            raise ValueError(f"images of {height}x{width} are smaller than crop_size={self.crop_size}")
        corners = torch.stack([integers(rows, len(images), rng), integers(columns, len(images), rng)], 1)
        small_crops, large_crops = [], []
        for index, (top, left) in enumerate(corners.tolist()):
            small_crops.append(_window(small[index], top, left, side))
            large_crops.append(_window(images[index], top * self.factor, left * self.factor, self.crop_size))
        return torch.stack(large_crops), torch.stack(small_crops)

    def _augment(self, small: Tensor, level: Tensor, rng: Rng) -> Tensor:
        """alpha_s * small + sigma_s * noise (Ho et al. 2022, section 4.2), without the offset of training."""
        noise = offset_noise(small.shape, 0.0, rng, small.device, small.dtype)
        return self.process.corrupt(small, noise, level)

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
        augmentation_level: float | None = None,
    ) -> Tensor:
        """As :meth:`Upsampler.upsample`; further:

        Args:
            augmentation_level: s of the noise given to ``images``; None is the stage's own.

        Raises:
            ValueError: a side of the result is not a multiple of the denoiser's ``side_multiple``.
        """
        with self.evaluating():
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            strength = self.augmentation_level if augmentation_level is None else augmentation_level
            height, width = size or tuple(side * self.factor for side in images.shape[-2:])
            images = images.to(self.device)
            text = self.text_encoder(list(prompts))
            uncond = self.text_encoder([negative_prompt] * len(prompts))
            rng, steps = picture_generators(seeds), self.num_steps if num_steps is None else num_steps
            level = images.new_full((len(images),), strength)
            small, denoiser = self._augment(images, level, rng), self.sampling_network

            def predict(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
                times = len(x_t) // len(small)  # guidance doubles the batch
                return self._predict(
                    denoiser, x_t, t, text, small.repeat(times, 1, 1, 1), level.repeat(times)
                )

            denoise = guided(predict, text, uncond, scale)
            shape = (len(images), images.shape[1], height, width)
            return self.process.sample(denoise, shape, steps, rng, self.device).float().clamp(-1, 1)

    def describe(self) -> Description:
        description = super().describe()
        names = ("factor", "crop_size", "max_level", "augmentation_level", "residual_std")
        description["init_args"] |= {name: getattr(self, name) for name in names}
        return description


def _window(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[:, top : top + side, left : left + side]
