"""Quality-tuning: a pre-trained generator, a small superb set, and a stop chosen by evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from emu_lightning.data.batch import Batch
from emu_lightning.modules.generator import Generator, Trainable, load_generator
from emu_lightning.optimizers import AdamW


class QualityTuningModule(Trainable):
    """Tunes any generator (Dai et al. 2023, section 3.3).

    The paper's recipe is batch 64, offset noise 0.1 and at most 15,000 iterations, although the loss still
    falls: the stop is chosen by evaluation (:class:`emu_lightning.callbacks.PreferenceEvaluation`). It gives
    neither learning rate nor optimizer; those in the configurations are choices.

    Args:
        init_from: where the pre-trained generator is: a generator folder or one of our checkpoints.
        overrides: arguments of the generator that tuning changes, by dotted name, e.g.
            ``{"process.noise_offset": 0.1}``.
        max_iterations: the hard cap; a trainer that would go on longer is refused.
        optimizer, lr_scheduler, seed: as in every training.
    """

    generator: Generator

    def __init__(
        self,
        init_from: str,
        overrides: dict[str, Any] | None = None,
        max_iterations: int = 15_000,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed)
        self.init_from, self.max_iterations = init_from, max_iterations
        self.overrides = overrides or {}
        self.generator = load_generator(init_from, overrides)

    def load_start(self) -> Generator:
        """The generator as it was before tuning, on this module's device.

        It draws with the overrides, so that nothing but the tuning differs, but under its own process.
        """
        return self.load_like_start(self.init_from)

    def load_like_start(self, path: str | Path) -> Generator:
        """The generator in a folder or checkpoint, on this module's device, drawing as the start does."""
        kept = {name: value for name, value in self.overrides.items() if "process" not in name.split(".")}
        return load_generator(path, kept).to(self.device).eval()

    def on_fit_start(self) -> None:
        steps = self.trainer.max_steps
        if not 0 <= steps <= self.max_iterations:
            raise ValueError(
                f"quality-tuning ends after at most {self.max_iterations} iterations, but the trainer's "
                f"max_steps is {steps}: set --trainer.max_steps, or raise --model.max_iterations"
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the generator as tuned so far; see ``Generator.save_pretrained``."""
        return self.generator.save_pretrained(folder)

    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **settings: Any) -> Tensor:
        """As :meth:`emu_lightning.modules.generator.Generator.generate`, with the weights as tuned so far."""
        return self.generator.generate(prompts, seeds, **settings)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] for the batch's texts."""
        return self.generate(batch.texts, batch.positions)
