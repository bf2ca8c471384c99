"""The progress bar: counts optimizer steps to `max_steps` and shows the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgressBar(TQDMProgressBar):
    """A bar over the whole run, where Lightning's counts the batches of an epoch that never ends.

    The metrics beside the bar are read (which waits for the device) only when it is redrawn.

    Args:
        seconds: time between two redrawings; 0.5 on a terminal and 30 in a log file when None.
    """

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__()
        self.seconds = (0.5 if sys.stderr.isatty() else 30.0) if seconds is None else seconds
        self._next_drawing = 0.0

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc=self.train_description,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,  # the mean rate of this process: validation and checkpoints are part of it
            bar_format=self.BAR_FORMAT,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = self.train_progress_bar = self.init_train_tqdm()
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = bar.n = trainer.global_step  # a resumed run is not fast because it had begun before
        self._next_drawing = 0.0

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Goes on with the one bar: an epoch means nothing when data never ends."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now < self._next_drawing and trainer.global_step != self.train_progress_bar.total:
            return
        self._next_drawing = now + self.seconds
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))  # redraws

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `on_train_epoch_start`."""
