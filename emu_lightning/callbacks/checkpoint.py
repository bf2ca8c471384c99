"""Checkpoints that survive a kill at any moment.

Lightning's `ModelCheckpoint` has three gaps that matter here (2.6.6): with `save_last="link"` the older file
is removed before the link moves, so a kill in between leaves nothing that `last` finds; it overwrites through
a temporary file that may lie on another disk, where moving is copying; and it does not save the last step of
a run unless that happens to be a multiple of `every_n_train_steps`, nor what modules do at the very end.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


def last_checkpoint(run: str | Path) -> Path:
    """Where a run folder keeps the checkpoint that `--ckpt_path last` resumes."""
    return Path(run) / "checkpoints" / "last.ckpt"


class RunCheckpoint(Checkpoint):
    """Keeps `<run>/checkpoints/last.ckpt` whole at every moment, and named iterations beside it.

    Args:
        every_n_train_steps: optimizer steps between two savings; what a kill can lose at most.
        keep_steps: optimizer steps whose checkpoint stays, as `step-<n>.ckpt`.

    Raises:
        ValueError: `every_n_train_steps` is not positive.
    """

    def __init__(self, every_n_train_steps: int = 500, keep_steps: Sequence[int] = ()) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps must be at least 1, not {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self.keep_steps = frozenset(keep_steps)
        self._saved_step = 0  # nothing to save before the first step
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long this run has taken over all its starts, without what was lost by a kill."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._started -= state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # a resumed run has this step on disk

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Loggers count steps apart, and one too many after resuming at a step where validation was due.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_n_train_steps == 0 or step in self.keep_steps
        if due and step != self._saved_step:  # with accumulated gradients a step has several batches
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The one hook of callbacks that comes after the module's own `on_train_end` and `on_fit_end`, where
        # the autoencoder measures its latents. Lightning does not call it after an exception.
        if stage == "fit":
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # SIGTERM is raised between two steps. Any other exception may have torn a step in half, and during
        # validation averaged weights may stand in for the trained ones: then the older file is better.
        between_steps = isinstance(exception, SIGTERMException) and trainer.training
        if between_steps and trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        last = last_checkpoint(trainer.default_root_dir)
        partial = last.with_suffix(".partial")
        trainer.save_checkpoint(partial, weights_only=False)  # every process takes part; process 0 writes
        if trainer.is_global_zero:
            if step in self.keep_steps:
                kept = last.with_name(f"step-{step}.ckpt")
                shutil.copyfile(partial, kept.with_suffix(".partial"))
                os.replace(kept.with_suffix(".partial"), kept)
            os.replace(partial, last)
        trainer.strategy.barrier("RunCheckpoint")
        self._saved_step = step
