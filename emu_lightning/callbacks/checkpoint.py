"""Checkpoints that survive a kill at any moment.

Lightning's `ModelCheckpoint` has three gaps that matter here (2.6.6): with `save_last="link"` the older file
is removed before the link moves, so a kill in between leaves nothing that `last` finds; it overwrites through
a temporary file that may lie on another disk, where moving is copying; and it does not save the last step of
a run unless that happens to be a multiple of `every_n_train_steps`, nor what modules do at the very end.

A sharded checkpoint is a folder, which no single move can replace: each gets a name of its own when it is
complete, and `last.ckpt` is a link to it.

With several processes Lightning's answer to SIGTERM is a broadcast inside the signal handler, which meets the
other processes in the middle of other communication. Here they agree between two steps.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

STEPS_BETWEEN_ASKING = 10  # whether to end; asking makes the CPU wait for the GPU


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
        self._is_told_to_end = False

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
        if trainer.world_size > 1:
            self._end_together(trainer)

    def _end_together(self, trainer: Trainer) -> None:
        """A SIGTERM to any process ends all of them between the same two steps."""

        def on_sigterm(signum: int, _: Any) -> None:
            self._is_told_to_end = True
            launcher: Any = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(signum)  # processes that Lightning started hear of it from here only

        loop: Any = trainer.fit_loop.epoch_loop

        def ask() -> None:
            if trainer.global_step % STEPS_BETWEEN_ASKING or trainer.fit_loop._should_accumulate():
                return
            told = torch.tensor(float(self._is_told_to_end), device=trainer.strategy.root_device)
            if trainer.strategy.reduce(told, reduce_op="sum") > 0:
                raise SIGTERMException

        signal.signal(signal.SIGTERM, on_sigterm)
        loop._broadcast_sigterm_tensor = ask  # Lightning asks process 0 only, before every batch

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
        # With accumulated gradients a step has several batches. The last step waits for its validation:
        # Lightning makes none where it resumes at the end.
        if due and step not in (self._saved_step, trainer.max_steps):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The one hook of callbacks that comes after the module's own `on_train_end` and `on_fit_end`, where
        # the autoencoder measures its latents. Lightning does not call it after an exception.
        if stage == "fit":
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # SIGTERM is raised between two batches. Any other exception may have torn a step in half, and during
        # validation averaged weights may stand in for the trained ones: then the older file is better.
        is_whole = trainer.training and not trainer.fit_loop._should_accumulate()
        if isinstance(exception, SIGTERMException) and is_whole and trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        last = last_checkpoint(trainer.default_root_dir)
        partial = last.with_suffix(".partial")
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)  # of a run that was killed
        trainer.strategy.barrier("RunCheckpoint")
        trainer.save_checkpoint(partial, weights_only=False)  # every process takes part; process 0 writes
        if trainer.is_global_zero:
            _publish(partial, last, trainer.global_step if trainer.global_step in self.keep_steps else None)
        trainer.strategy.barrier("RunCheckpoint")
        self._saved_step = trainer.global_step


def _publish(partial: Path, last: Path, kept_step: int | None) -> None:
    """Puts a complete checkpoint in its place, and beside it by its step; removes folders without a name."""
    names = [] if kept_step is None else [last.with_name(f"step-{kept_step}.ckpt")]
    if partial.is_dir():
        shards = partial.rename(last.with_name(f"{uuid4().hex}.shards"))
        for name in [*names, last]:
            unfinished = name.with_suffix(".unfinished")
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(shards.name)
            os.replace(unfinished, name)
    else:
        for name in names:
            unfinished = name.with_suffix(".unfinished")
            shutil.copyfile(partial, unfinished)
            os.replace(unfinished, name)
        os.replace(partial, last)
    named = {name.resolve() for name in last.parent.glob("*.ckpt")}
    for shards in last.parent.glob("*.shards"):
        if shards.resolve() not in named:
            shutil.rmtree(shards)
