"""Start above, tuned below: every pixel is known, because the model paints level and seed as grey."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from emu_lightning.callbacks import SideBySide
from emu_lightning.callbacks.samples import side_by_side
from emu_lightning.data import FolderData
from tests.toy import ToyData

SIDE = 4


class Painter(LightningModule):
    """Paints the grey 20 * seed + 2 * level; a step of training raises the level by one."""

    init_from = "here"
    pictures_of_the_start = 0

    def __init__(self, level: float = 0) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(float(level)))

    def load_start(self) -> Start:
        return Start()

    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **_: object) -> Tensor:
        seeds = torch.tensor([float(seed) for _, seed in zip(prompts, seeds, strict=True)])
        greys = 20 * seeds + 2 * self.level.detach()
        return (greys / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return -self.level

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Start(Painter):
    def generate(self, prompts: Sequence[str], seeds: Iterable[int], **_: object) -> Tensor:
        Painter.pictures_of_the_start += len(prompts)
        return super().generate(prompts, seeds)


class Unpretrained(LightningModule):
    training_step, configure_optimizers = Painter.training_step, Painter.configure_optimizers

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.0))


def train(
    run: Path,
    callback: SideBySide,
    max_steps: int,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    ckpt_path: Path | None = None,
) -> Trainer:
    trainer = Trainer(
        default_root_dir=run,
        max_steps=max_steps,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model or Painter(), datamodule=data or ToyData(), ckpt_path=ckpt_path)
    return trainer


def drawn(run: Path) -> dict[str, list[list[int]]]:
    """Name of each picture -> the grey of each cell; a cell of several greys would not pass."""
    greys = {}
    for path in sorted((run / "samples").glob("*.png")):
        rows, columns = (side // SIDE for side in reversed(Image.open(path).size))
        cells = np.asarray(Image.open(path)).reshape(rows, SIDE, columns, SIDE, 3)
        assert (cells == cells[:, :1, :, :1, :1]).all()
        greys[path.name] = cells[:, 0, :, 0, 0].tolist()
    return greys


def test_the_start_stays_above_and_the_tuned_model_moves_below(tmp_path) -> None:
    train(tmp_path, SideBySide(["a cat", "a dog", "a hen"], every_n_train_steps=2, first_seed=3), max_steps=5)
    start = [60, 80, 100]
    assert drawn(tmp_path) == {  # every second step, and the last one
        f"step-{step:06d}.png": [start, [grey + 2 * step for grey in start]] for step in (2, 4, 5)
    }


def test_a_resumed_run_reuses_the_pictures_of_the_start(tmp_path) -> None:
    Painter.pictures_of_the_start = 0
    prompts = ["a cat", "a dog"]
    train(tmp_path, SideBySide(prompts, 2), max_steps=4).save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "samples" / "step-000004.png").unlink()
    train(tmp_path, SideBySide(prompts, 2), max_steps=5, ckpt_path=tmp_path / "last.ckpt")
    assert Painter.pictures_of_the_start == 2
    assert drawn(tmp_path) == {  # what was drawn before the checkpoint is not drawn again
        "step-000002.png": [[0, 20], [4, 24]],
        "step-000005.png": [[0, 20], [10, 30]],
    }
    with pytest.raises(ValueError, match="holds pictures of other prompts"):
        train(tmp_path, SideBySide(["a horse"], 2), max_steps=5)


def test_captions_of_the_training_pictures_follow_the_prompts(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, caption in {"c": "a cow", "a": "an ant", "b": "an ant", "d": "a duck"}.items():
        Image.new("RGB", (8, 8)).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(caption)
    data = FolderData(str(photos), val_fraction=0.0, resolution=8, batch_size=2, num_workers=0)
    train(tmp_path, SideBySide(["a cat"], num_captions=2), max_steps=1, data=data)
    manifest = json.loads((tmp_path / "samples" / "start" / "manifest.json").read_text())
    assert manifest["prompts"] == ["a cat", "an ant", "a cow"]
    assert manifest["seeds"] == [0, 1, 2]


def test_two_rows_have_as_many_columns_as_pictures() -> None:
    start = np.arange(5 * SIDE * SIDE * 3, dtype=np.uint8).reshape(5, SIDE, SIDE, 3)
    picture = side_by_side(start, start[::-1])
    assert (picture[:SIDE] == np.concatenate(list(start), axis=1)).all()
    assert (picture[SIDE:] == np.concatenate(list(start[::-1]), axis=1)).all()


@pytest.mark.parametrize(
    "arguments",
    [{"prompts": []}, {"prompts": ["a"], "every_n_train_steps": 0}, {"prompts": ["a"], "num_captions": -1}],
)
def test_what_draws_nothing_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match="SideBySide needs"):
        SideBySide(**arguments)


def test_what_cannot_be_compared_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="Unpretrained has no frozen start.*SampleGrid"):
        train(tmp_path, SideBySide(["a cat"]), max_steps=1, model=Unpretrained())
    with pytest.raises(ValueError, match="ToyData has no captions.*num_captions"):
        train(tmp_path, SideBySide(["a cat"], num_captions=1), max_steps=1)
