"""Trains autoencoders: reconstruction, perceptual, KL and patch-adversarial loss."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.optim import Optimizer
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from emu_lightning.data.batch import Batch
from emu_lightning.losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    perceptual_distance,
    reconstruction_loss,
)
from emu_lightning.models import (
    Autoencoder,
    FeatureNetwork,
    PatchDiscriminator,
    PooledFeatures,
    RandomFeatures,
    VQAutoencoder,
)
from emu_lightning.parallel import Sharded, gathered, mean_where_logged
from emu_lightning.processes.seeding import generators_for

log = logging.getLogger(__name__)


class ReconstructionModule(LightningModule, ABC):
    """What all autoencoders share: to reconstruct, judged by pixels, by features and by a discriminator.

    The objective, per colour value (see `losses`)::

        reconstruction + perceptual_weight * perceptual + bottleneck
            + adversarial_weight * adaptive * adversarial        from step adversarial_start on

    where the bottleneck's part is a subclass's. Emu states an adversarial loss but no weight, start, or
    perceptual network: the defaults are choices, LDM's unless said otherwise below.

    Lightning's `global_step`, and so `max_steps`, checkpoint names and the x-axis of the logs, counts steps
    of the autoencoder only. Randomness is a function of (seed, each sample's position), so that a resumed run
    repeats the uninterrupted one.

    Args:
        autoencoder: the network.
        discriminator: None trains without adversarial loss.
        perceptual: features of the perceptual loss; None trains without it.
        metric_features: features of the validation metrics, named after them; by default `RandomFeatures` of
            another seed than the loss's. Use a network with real weights for figures that others can compare.
        reconstruction: absolute or squared differences.
        perceptual_weight: of the perceptual loss. LDM has 1.0 for LPIPS; random features want 0.1 at most.
        adversarial_weight: of the adversarial loss.
        adversarial_start: step from which the discriminator takes part; it is not evaluated before. LDM
            waits for 50,001 steps.
        use_adaptive_weight: scale the adversarial loss so that it pulls as hard as the rest
            (`adaptive_weight`).
        optimizer: of the autoencoder.
        discriminator_optimizer: of the discriminator; LDM trains both with Adam and betas [0.5, 0.9].
        lr_scheduler: of the autoencoder's learning rate, stepped once per training step; the discriminator's
            rate stays constant.
        gradient_clip: largest gradient norm, for each of the two networks; None does not clip.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | VQAutoencoder,
        discriminator: PatchDiscriminator | None = None,
        perceptual: FeatureNetwork | None = None,
        metric_features: FeatureNetwork | None = None,
        reconstruction: Literal["l1", "l2"] = "l1",
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        use_adaptive_weight: bool = True,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        discriminator_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self.perceptual = perceptual
        self.metrics = ReconstructionMetrics(metric_features or RandomFeatures(seed=1))
        self.reconstruction: Literal["l1", "l2"] = reconstruction
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.use_adaptive_weight = use_adaptive_weight
        self.optimizer = optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_clip = gradient_clip
        self.seed = seed

    @abstractmethod
    def reconstruct(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The reconstructions (B, 3, H, W), the bottleneck's terms by name, and its part of the loss."""

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # Lightning's return type is a union of nine
        optimizers = [self.optimizer(self.autoencoder.parameters())]
        schedulers = [self.lr_scheduler(optimizers[0])] if self.lr_scheduler else []
        if self.discriminator is not None:
            optimizers.append(self.discriminator_optimizer(self.discriminator.parameters()))
        return optimizers, schedulers

    def on_fit_start(self) -> None:
        strategy = self.trainer.strategy
        if self.discriminator is not None and isinstance(strategy, DDPStrategy):
            if not strategy._ddp_kwargs.get("find_unused_parameters"):
                raise ValueError(
                    "autoencoder and discriminator train in turn, for which DDP needs "
                    "--trainer.strategy=ddp_find_unused_parameters_true, as configs/hardware/ddp.yaml has it"
                )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        images = images_of(batch)
        with _inputs_of(self.autoencoder.last_layer) as activations:
            reconstructions, terms, bottleneck = self.reconstruct(batch)
        critic = self.discriminator if self.global_step >= self.adversarial_start else None

        # What judges the pictures is differentiated up to them only, and once: the autoencoder then has one
        # backward pass, from the sum of what pulls at its pictures.
        seen = reconstructions.detach().float().requires_grad_()
        values = self._reconstruction_terms(images, seen) | terms
        loss = values["similarity"] + bottleneck
        pull = _gradient(values["similarity"], seen)
        if critic is not None:
            values["adversarial"] = hinge_generator_loss(critic(seen))
            towards_real = _gradient(values["adversarial"], seen)
            weight = self.adversarial_weight * self._adaptive_weight(activations[0], pull, towards_real)
            values["adversarial_weight"] = weight
            loss = loss + weight * values["adversarial"]
            pull = pull + weight * towards_real
        self._step_autoencoder((reconstructions * pull).sum() + bottleneck)
        if critic is not None:
            values["discriminator"] = hinge_discriminator_loss(critic(images), critic(seen.detach()))
            self._step_discriminator(values["discriminator"])

        values["loss"] = loss
        self.log_dict(
            {f"train/{name}": mean_where_logged(self.trainer, value) for name, value in values.items()},
            batch_size=len(images),
        )

    def _reconstruction_terms(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        reconstruction = reconstruction_loss(reconstructions, images, self.reconstruction)
        if self.perceptual is None:
            return {"reconstruction": reconstruction, "similarity": reconstruction}
        with torch.no_grad():
            targets = self.perceptual(images)
        perceptual = perceptual_distance(self.perceptual(reconstructions), targets).mean()
        similarity = reconstruction + self.perceptual_weight * perceptual
        return {"reconstruction": reconstruction, "perceptual": perceptual, "similarity": similarity}

    def _adaptive_weight(self, activation: Tensor, towards_data: Tensor, towards_real: Tensor) -> Tensor:
        """Of two gradients by the pictures (B, 3, H, W), which the last layer made of ``activation``.

        The gradients by that layer's weight are means over all processes, as with one process, and formed
        here because a sharded weight is no leaf of the graph.
        """
        if not self.use_adaptive_weight:
            return torch.ones((), device=self.device)
        layer = self.autoencoder.last_layer
        pulls = [
            conv2d_weight(activation.float(), layer.weight.shape, pull, layer.stride, layer.padding)
            for pull in (towards_data, towards_real)
        ]
        return adaptive_weight(*self.trainer.strategy.reduce(torch.stack(pulls), reduce_op="mean"))

    def _step_autoencoder(self, loss: Tensor) -> None:
        optimizer = _first(self.optimizers())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.lr_scheduler is not None:
            _first(self.lr_schedulers()).step()

    def _step_discriminator(self, loss: Tensor) -> None:
        """Steps torch's optimizer through the strategy: Lightning's wrapper would count in `global_step`."""
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]  # there are two
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.trainer.strategy.optimizer_step(optimizer, closure=lambda: None)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.gradient_clip is not None:
            self.clip_gradients(optimizer, self.gradient_clip, "norm")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = images_of(batch)
        self.metrics.update(images, self.autoencoder.reconstruct(images))

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        if not self.trainer.sanity_checking:
            self.log_dict({f"{stage}/{name}": value for name, value in self.metrics.compute().items()})
        self.metrics.reset()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the autoencoder alone, for its class's `from_pretrained(folder)`.

        Args:
            folder: receives config.json and the weights as safetensors. Where they are sharded every process
                takes part; the first one writes.
            dtype: of the weights; buffers stay in float32.
        """
        state = gathered(self.autoencoder.state_dict())
        if state is not None:
            arguments = {k: v for k, v in self.autoencoder.config.items() if not k.startswith("_")}
            whole = type(self.autoencoder)(**arguments)
            whole.load_state_dict(state)
            whole.save(folder, dtype)


class AutoencoderModule(ReconstructionModule):
    """The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1; Emu, section 3.1).

    The bottleneck's part of the loss is kl_weight * kl. LDM's output variance is left out: it is in no
    optimizer there, so it stays 1.

    Args:
        autoencoder: the network; its `latent_mean` and `latent_std` are measured when training ends.
        discriminator, perceptual: see :class:`ReconstructionModule`.
        kl_weight: of the KL divergence to the standard normal.
        num_latent_batches: batches (validation, else training) that the latents' shift and scale are measured
            on.
        kwargs: of :class:`ReconstructionModule`; the seed is that of the posterior's noise.
    """

    autoencoder: Autoencoder

    def __init__(
        self,
        autoencoder: Autoencoder,
        discriminator: PatchDiscriminator | None = None,
        perceptual: FeatureNetwork | None = None,
        *,
        kl_weight: float = 1e-6,
        num_latent_batches: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(autoencoder, discriminator, perceptual, **kwargs)
        self.kl_weight = kl_weight
        self.num_latent_batches = num_latent_batches
        self._latents_measured = False

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            kl = self.autoencoder.kl  # its parts, because encoding and decoding alone call no more than those
            parts: list[nn.Module] = [kl.encoder, kl.quant_conv, kl.post_quant_conv, kl.decoder]
            self.trainer.strategy.shard(parts if self.discriminator is None else [*parts, self.discriminator])

    def reconstruct(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        images = images_of(batch)
        rng = generators_for(self.seed, batch.positions, self.device)
        reconstructions, posterior = self.autoencoder(images, rng)
        kl = kl_loss(posterior.mean.float(), posterior.logvar.float(), num_values=images[0].numel())
        return reconstructions, {"kl": kl}, self.kl_weight * kl

    def on_train_end(self) -> None:
        self._measure_latents()

    def on_fit_end(self) -> None:
        if not self._latents_measured:  # a finished run, started again, trains nothing: no on_train_end
            self._measure_latents()

    def _measure_latents(self) -> None:
        loader: Any = self.trainer.train_dataloader
        if self.trainer.enable_validation:
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing where validation has run
            loader = self.trainer.val_dataloaders
        batches = (self.transfer_batch_to_device(batch, self.device, 0) for batch in loader)
        self.autoencoder.measure_latents(
            images_of(batch) for batch in islice(batches, self.num_latent_batches)
        )
        # every process saw its own batches; the first one's figures are the ones that are saved
        for buffer in (self.autoencoder.latent_mean, self.autoencoder.latent_std):
            buffer.copy_(self.trainer.strategy.broadcast(buffer.cpu()))  # else all would use the first GPU
        self._latents_measured = True


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM, perceptual and Frechet distance of reconstructions to their originals.

    Args:
        network: makes the features. Its name ends the names of the distances ("rfd_random" is the Frechet
            distance of random features, "rfd_inception_v3" would be the literature's rFID): they compare only
            with their like.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.perceptual = MeanMetric()
        features = PooledFeatures(network)
        self.num_features = features.num_features
        self.frechet = FrechetInceptionDistance(features)
        self.num_images = SumMetric()
        self._has_explained = False

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Adds a batch: two (B, 3, H, W) in [-1, 1]; the reconstructions are clamped to it first."""
        with torch.autocast(images.device.type, enabled=False):
            images, reconstructions = images.float(), reconstructions.float().clamp(-1, 1)
            self.perceptual.update(perceptual_distance(self.network(reconstructions), self.network(images)))
            images, reconstructions = images / 2 + 0.5, reconstructions / 2 + 0.5
            self.psnr.update(reconstructions, images)
            self.ssim.update(reconstructions, images)
            self.frechet.update((images * 255).round().byte(), real=True)
            self.frechet.update((reconstructions * 255).round().byte(), real=False)
            self.num_images.update(len(images))

    def compute(self) -> dict[str, Any]:
        """psnr (dB, mean over images), ssim (mean), perceptual_<name>, and rfd_<name> where there are enough
        images.

        A covariance of D features has full rank only with more than D images. With fewer the distance is
        absent, and the log says why, once.
        """
        values: dict[str, Any] = {
            "psnr": self.psnr.compute(),
            "ssim": self.ssim.compute(),
            f"perceptual_{self.network.name}": self.perceptual.compute(),
        }
        num_images = int(self.num_images.compute())
        if num_images > self.num_features:
            values[f"rfd_{self.network.name}"] = self.frechet.compute()
        elif not self._has_explained:
            self._has_explained = True
            log.warning(
                f"rfd_{self.network.name} is left out: a Frechet distance of {self.num_features} features "
                f"needs more than {self.num_features} images, there are {num_images}"
            )
        return values

    def reset(self) -> None:
        """Forgets all batches."""
        for metric in (self.psnr, self.ssim, self.perceptual, self.frechet, self.num_images):
            metric.reset()


def images_of(batch: Batch) -> Tensor:
    """The images of a batch.

    Raises:
        ValueError: the batch has none.
    """
    if batch.images is None:
        raise ValueError(
            "an autoencoder learns from images, but the data gives latents: switch their cache off"
        )
    return batch.images


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer is called with inside the context, without gradient."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    try:
        yield inputs
    finally:
        handle.remove()


def _gradient(loss: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(loss, images)[0]


def _first(one_or_more: Any) -> Any:
    """Lightning gives a lone optimizer or scheduler bare, several as a list."""
    return one_or_more[0] if isinstance(one_or_more, list) else one_or_more
