"""Pictures of fixed prompts at fixed seeds, as training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from emu_lightning.evaluation.generation import to_uint8, write_png


def picture_grid(pictures: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """(N, H, W, 3) to one picture of ``columns`` columns, black where the last row ends early."""
    num, height, width, _ = pictures.shape
    rows = -(-num // columns)
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:num] = pictures
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, 3)


class SampleGrid(Callback):
    """Writes ``<run>/samples/step-<n>.png``: a row-major grid of ``prompts``, the same seeds every time.

    Args:
        prompts: one picture each.
        every_n_train_steps: optimizer steps between two grids.
        columns: of the grid.
        first_seed: prompt i has seed ``first_seed + i``.
    """

    def __init__(
        self, prompts: list[str], every_n_train_steps: int = 1000, columns: int = 8, first_seed: int = 0
    ) -> None:
        if not prompts or every_n_train_steps < 1:
            raise ValueError("SampleGrid needs at least one prompt, and every_n_train_steps of at least 1")
        self.prompts, self.every_n_train_steps = prompts, every_n_train_steps
        self.columns, self.first_seed = columns, first_seed
        self._drawn_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With gradient accumulation several batches end at the same step.
        if step % self.every_n_train_steps or step == self._drawn_step or not trainer.is_global_zero:
            return
        self._drawn_step = step
        seeds = range(self.first_seed, self.first_seed + len(self.prompts))
        grid = picture_grid(to_uint8(pl_module.generate(self.prompts, seeds)), self.columns)  # type: ignore[operator]
        path = Path(trainer.default_root_dir) / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, grid)
