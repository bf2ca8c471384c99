"""Pictures made small and raised again, as a super-resolution stage trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from emu_lightning.callbacks.samples import picture_grid, show, write_step
from emu_lightning.data.batch import Batch, collate, resized
from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.pictures import Pictures
from emu_lightning.evaluation.generation import to_uint8


@runtime_checkable
class Upsamples(Protocol):
    """A super-resolution stage."""

    factor: int

    def upsample(self, images: Tensor, prompts: Sequence[str], seeds: Iterable[int]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], larger by the factor than those given."""


class SuperResolutionGrid(Callback):
    """Writes ``<run>/samples/step-<n>.png``: small pictures, enlarged, above what is made of them, above the
    originals; a column each, the same pictures and seeds every time.

    They are the first pictures of validation, at the data's resolution.

    Args:
        num_pictures: columns.
        every_n_train_steps: optimizer steps between two grids.
        first_seed: column i has seed ``first_seed + i``.
    """

    def __init__(self, num_pictures: int = 8, every_n_train_steps: int = 1000, first_seed: int = 0) -> None:
        if num_pictures < 1 or every_n_train_steps < 1:
            raise ValueError("num_pictures and every_n_train_steps of SuperResolutionGrid must be at least 1")
        self.num_pictures, self.every_n_train_steps = num_pictures, every_n_train_steps
        self.first_seed = first_seed
        self._batch: Batch
        self._drawn_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Upsamples):
            raise ValueError(
                f"{type(pl_module).__name__} is no super-resolution stage, which SuperResolutionGrid is for: "
                "SampleGrid draws the pictures of any generator"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        source = data.source("val") if isinstance(data, ImageData) else None
        if source is None:
            raise ValueError(
                f"{type(data).__name__} has no validation pictures for SuperResolutionGrid: leave it out"
            )
        pictures = Pictures(source, data.resolution)
        self._batch = collate([pictures[i, i] for i in range(min(self.num_pictures, len(source)))])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With gradient accumulation several batches end at the same step.
        if step % self.every_n_train_steps or step == self._drawn_step:
            return
        self._drawn_step = step
        originals = self._batch.images
        assert originals is not None  # no latents
        small = resized(self._batch, originals.shape[-1] // pl_module.factor).images
        assert small is not None
        seeds = range(self.first_seed, self.first_seed + len(small))
        # Every process makes them: none has the whole weights where they are sharded. The first one writes.
        made = pl_module.upsample(small.to(pl_module.device), self._batch.texts, seeds).cpu()
        enlarged = small.repeat_interleave(pl_module.factor, 2).repeat_interleave(pl_module.factor, 3)
        if trainer.is_global_zero:
            rows = [to_uint8(images) for images in (enlarged, made, originals)]
            write_step(trainer, picture_grid(np.concatenate(rows), columns=len(small)))
            columns = dict(zip(("small", "made", "original"), rows, strict=True))
            show(trainer, "samples", self._batch.texts, seeds, columns)
