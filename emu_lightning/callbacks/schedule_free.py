"""Makes schedule-free optimizers show their average to everything but the training step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ScheduleFree(Callback):
    """For `schedulefree`'s optimizers (Defazio et al. 2024), which train at one point and mean another.

    Gradients are taken at y, between the average x and the fast weights z; x is the model. The optimizer
    moves the weights from one to the other. Here they are y only from the start of a batch to the end of the
    optimizer's step, and x everywhere else: in validation, samples, checkpoints, hand-overs and averages. So
    a checkpoint holds x and z, and a resumed run goes on exactly. It costs two passes over the weights a
    step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in self._optimizers(trainer):
            optimizer.register_step_post_hook(lambda stepped, *_: stepped.eval())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in self._optimizers(trainer):
            optimizer.train()

    def _optimizers(self, trainer: Trainer) -> list[Any]:
        """The trainer's optimizers.

        Raises:
            ValueError: one of them is not schedule-free.
        """
        for optimizer in trainer.optimizers:
            if not hasattr(optimizer, "train"):
                raise ValueError(
                    f"ScheduleFree is for optimizers such as schedulefree.AdamWScheduleFree, and "
                    f"{type(optimizer).__name__} is none: leave the callback out"
                )
        return trainer.optimizers
