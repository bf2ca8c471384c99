"""Pictures of fixed prompts at fixed seeds, as training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from emu_lightning.data.datamodule import ImageData
from emu_lightning.evaluation.generation import Generates, generate_folder, to_uint8, write_png


def picture_grid(pictures: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """(N, H, W, 3) to one picture of ``columns`` columns, black where the last row ends early."""
    num, height, width, _ = pictures.shape
    rows = -(-num // columns)
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:num] = pictures
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, 3)


@runtime_checkable
class ShowsPictures(Protocol):
    """A logger that people look at pictures in."""

    def log_pictures(
        self,
        name: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        pictures: Mapping[str, NDArray[np.uint8]],
        step: int,
    ) -> None:
        """A row a prompt: prompt, seed, and of each of ``pictures`` (N, H, W, 3) one."""


def show(
    trainer: Trainer,
    name: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    pictures: Mapping[str, NDArray[np.uint8]],
) -> None:
    """Gives pictures, by what they are, to the loggers that show any; for the first process."""
    for logger in trainer.loggers:
        if isinstance(logger, ShowsPictures):  # loggers number the steps from 0
            logger.log_pictures(name, prompts, seeds, pictures, max(0, trainer.global_step - 1))


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
        if step % self.every_n_train_steps or step == self._drawn_step:
            return
        self._drawn_step = step
        seeds = range(self.first_seed, self.first_seed + len(self.prompts))
        # Every process draws: none has the whole weights where they are sharded. The first one writes.
        pictures = to_uint8(pl_module.generate(self.prompts, seeds))  # type: ignore[operator]
        if trainer.is_global_zero:
            write_step(trainer, picture_grid(pictures, self.columns))
            show(trainer, "samples", self.prompts, seeds, {"picture": pictures})


@runtime_checkable
class Tunes(Protocol):
    """A module that can make anew what it started from, as quality-tuning can."""

    init_from: str

    def load_start(self) -> Generates:
        """The generator as it was before tuning."""


def pictures_of_the_start(
    trainer: Trainer,
    pl_module: LightningModule,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
) -> NDArray[np.uint8]:
    """What the model drew before tuning, (N, H, W, 3); kept in ``<run>/samples/start``.

    They come from the start's own weights, so that a resumed run has the same ones.

    Raises:
        ValueError: the module started from nothing, or the folder holds pictures of other prompts or seeds.
    """
    if not isinstance(pl_module, Tunes):
        raise ValueError(
            f"{type(pl_module).__name__} has no frozen start to compare with: "
            "that is for quality-tuning; SampleGrid draws the pictures of any generator"
        )
    return generate_folder(
        pl_module.load_start(),
        prompts,
        seeds,
        Path(trainer.default_root_dir) / "samples" / "start",
        settings={"init_from": str(pl_module.init_from)},
        batch_size=batch_size,
        description="pictures of the start",
    )


def side_by_side(start: NDArray[np.uint8], tuned: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, H, W, 3) twice to one picture of two rows: the start's above, the tuned model's below."""
    return picture_grid(np.concatenate([start, tuned]), len(start))


def write_step(trainer: Trainer, picture: NDArray[np.uint8]) -> None:
    """Writes (H, W, 3) to ``<run>/samples/step-<n>.png`` of the trainer's step."""
    path = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, picture)


class SideBySide(Callback):
    """Writes ``<run>/samples/step-<n>.png``: the frozen start's pictures above, the tuned model's below.

    Both rows have the same prompts and seeds; ``<run>/samples/start/manifest.json`` lists them. The last step
    is drawn too. Where a scorer judges the pictures, :class:`PreferenceEvaluation` draws the same.

    Args:
        prompts: one column each.
        every_n_train_steps: optimizer steps between two pictures.
        num_captions: columns after those of ``prompts``, for captions of the training pictures: the first
            different ones by name. They show what the model takes from them, ``prompts`` what it keeps.
        first_seed: column i has seed ``first_seed + i``.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_train_steps: int = 50,
        num_captions: int = 0,
        first_seed: int = 0,
    ) -> None:
        if every_n_train_steps < 1 or num_captions < 0 or not (prompts or num_captions):
            raise ValueError(
                "SideBySide needs prompts or num_captions, and every_n_train_steps of at least 1"
            )
        self.prompts, self.every_n_train_steps = prompts, every_n_train_steps
        self.num_captions, self.first_seed = num_captions, first_seed
        self._start: NDArray[np.uint8]
        self._columns: list[str] = []
        self._drawn_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_step = trainer.global_step  # a resumed run has drawn this one
        self._columns = [*self.prompts, *self._captions(trainer)]
        if trainer.is_global_zero:
            self._start = pictures_of_the_start(trainer, pl_module, self._columns, self._seeds)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_train_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    @property
    def _seeds(self) -> range:
        return range(self.first_seed, self.first_seed + len(self._columns))

    def _captions(self, trainer: Trainer) -> list[str]:
        if not self.num_captions:
            return []
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        source = data.source("train") if isinstance(data, ImageData) else None
        if source is None:
            raise ValueError(
                f"{type(data).__name__} has no captions to show: set num_captions of SideBySide to 0"
            )
        order = sorted(range(len(source)), key=source.uid)
        return list(dict.fromkeys(source.text(index) for index in order))[: self.num_captions]

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With gradient accumulation several batches end at the same step.
        if trainer.global_step == self._drawn_step:
            return
        self._drawn_step = trainer.global_step
        tuned = to_uint8(pl_module.generate(self._columns, self._seeds))  # type: ignore[operator]
        if trainer.is_global_zero:
            write_step(trainer, side_by_side(self._start, tuned))
            show(trainer, "samples", self._columns, self._seeds, {"start": self._start, "tuned": tuned})
