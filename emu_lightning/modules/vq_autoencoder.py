"""Trains the autoencoder of masked generation, and keeps its codes in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from emu_lightning.data.batch import Batch
from emu_lightning.losses import codebook_loss, commitment_loss
from emu_lightning.models import FeatureNetwork, PatchDiscriminator, VQAutoencoder
from emu_lightning.models.vq import perplexity
from emu_lightning.modules.autoencoder import ReconstructionModule, images_of
from emu_lightning.parallel import Sharded
from emu_lightning.processes.seeding import generator_for


class VQAutoencoderModule(ReconstructionModule):
    """The autoencoder of Muse (Chang et al. 2023, section 2.2), which is VQGAN's (Esser et al. 2021).

    The bottleneck's part of the loss is codebook + commitment_weight * commitment (van den Oord et al. 2017,
    eq. 3).

    A code that no latent is nearest to gets no gradient and stays unused for ever. So every `usage_window`
    steps such codes are moved to latents of the batch at hand, drawn at random (the random restarts of
    Jukebox, Dhariwal et al. 2020). At step 0 that is all of them, unless the network comes trained: the
    codebook starts from the data. Both are choices: what Muse does is not known here.

    Logs the share of codes in use and their perplexity: in training over about the last `usage_window` steps
    (`VQAutoencoder.usage`), where a code counts from a hundredth of the mean share on; in validation over all
    its pictures, where one use counts.

    Args:
        autoencoder: the network.
        discriminator, perceptual: see :class:`ReconstructionModule`.
        commitment_weight: beta.
        usage_window: steps between two searches for unused codes.
        kwargs: of :class:`ReconstructionModule`; the seed is that of the latents that codes are moved to.
    """

    autoencoder: VQAutoencoder

    def __init__(
        self,
        autoencoder: VQAutoencoder,
        discriminator: PatchDiscriminator | None = None,
        perceptual: FeatureNetwork | None = None,
        *,
        commitment_weight: float = 0.25,
        usage_window: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(autoencoder, discriminator, perceptual, **kwargs)
        self.commitment_weight = commitment_weight
        self.usage_window = usage_window
        self.codebook_metrics = CodebookMetrics(autoencoder.config.codebook_size)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            raise ValueError(
                "a VQ autoencoder is not sharded, because its codes are compared and moved as a whole: train "
                "it with configs/hardware/ddp.yaml"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step % self.usage_window == 0:
            self._move_unused_codes(batch)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        reconstructions, latents, codes, ids = self.autoencoder(images_of(batch))
        usage = self._update_usage(ids)
        terms = {
            "codebook": codebook_loss(latents.float(), codes.float()),
            "commitment": commitment_loss(latents.float(), codes.float()),
            "codebook_usage": 1 - self.autoencoder.unused().float().mean(),
            "codebook_perplexity": perplexity(usage / usage.sum()),
        }
        return reconstructions, terms, terms["codebook"] + self.commitment_weight * terms["commitment"]

    def _update_usage(self, ids: Tensor) -> Tensor:
        """The new `usage`: an average over steps that forgets in `usage_window` of them."""
        usage = self.autoencoder.usage
        counts = self.trainer.strategy.reduce(ids.flatten().bincount(minlength=len(usage)), reduce_op="sum")
        return usage.lerp_(counts / counts.sum(), 1 / self.usage_window)

    @torch.no_grad()
    def _move_unused_codes(self, batch: Batch) -> None:
        unused = self.autoencoder.unused().nonzero()[:, 0]
        latents = self.autoencoder.encode(images_of(batch)).movedim(1, -1).flatten(0, -2)
        latents = self.all_gather(latents).flatten(0, -2)  # type: ignore[union-attr]  # of all processes
        # every process draws the same: what the first sample of all of them gives
        position = self.trainer.strategy.broadcast(batch.position)
        order = torch.randperm(len(latents), generator=generator_for(self.seed, position))
        chosen = order[torch.arange(len(unused)) % len(order)].to(latents.device)
        self.autoencoder.codebook.weight[unused] = latents[chosen].to(self.autoencoder.codebook.weight)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = images_of(batch)
        reconstructions, _, _, ids = self.autoencoder(images)
        self.metrics.update(images, reconstructions)
        self.codebook_metrics.update(ids)

    def _log_metrics(self, stage: str) -> None:
        if not self.trainer.sanity_checking:
            values = self.codebook_metrics.compute()
            self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        self.codebook_metrics.reset()
        super()._log_metrics(stage)


class CodebookMetrics(Metric):
    """How much of a codebook pictures use.

    Args:
        codebook_size: K.
    """

    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Tensor) -> None:
        """Adds ids (B, h, w) int64 in 0 ... K - 1."""
        self.counts += ids.flatten().bincount(minlength=len(self.counts))

    def compute(self) -> dict[str, Tensor]:
        """codebook_usage, the share of codes that occur; codebook_perplexity, from 1 to K."""
        return {
            "codebook_usage": (self.counts > 0).float().mean(),
            "codebook_perplexity": perplexity(self.counts / self.counts.sum()),
        }
