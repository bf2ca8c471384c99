from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule
from PIL import Image

from emu_lightning.callbacks import SampleGrid
from emu_lightning.callbacks.samples import picture_grid
from emu_lightning.evaluation.generation import to_images
from tests.tiny import TinyData, make_trainer


def test_a_grid_is_read_row_by_row() -> None:
    pictures = np.random.default_rng(0).integers(1, 256, (7, 4, 5, 3), dtype=np.uint8)
    grid = picture_grid(pictures, 3)
    assert grid.shape == (3 * 4, 3 * 5, 3)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, 3)
        assert np.array_equal(grid[4 * row : 4 * row + 4, 5 * column : 5 * column + 5], picture)
    assert not grid[8:, 5:].any()  # the last row ends early
    assert np.array_equal(picture_grid(pictures[:2], 2), np.concatenate(list(pictures[:2]), axis=1))


class Counter(LightningModule):
    """Draws its step, the seed and the prompt's length; remembers when it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[int, list[str], list[int]]] = []

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def generate(self, prompts: Sequence[str], seeds: Iterable[int]) -> torch.Tensor:
        seeds = list(seeds)
        self.asked.append((self.global_step, list(prompts), seeds))
        colours = [(self.global_step, seed, len(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]
        return to_images(np.asarray(colours, np.uint8)[:, None, None]).expand(-1, -1, 2, 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "samples").iterdir())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_grid_is_drawn_once_every_so_many_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    module, grid = Counter(), SampleGrid(["a", "bb", "ccc"], every_n_train_steps=2, columns=2, first_seed=50)
    trainer = make_trainer(tmp_path, max_steps=5, accumulate_grad_batches=accumulate, callbacks=[grid])
    trainer.fit(module, TinyData())
    assert module.asked == [(2, ["a", "bb", "ccc"], [50, 51, 52]), (4, ["a", "bb", "ccc"], [50, 51, 52])]
    assert names(tmp_path) == ["step-000002.png", "step-000004.png"]
    drawn = np.asarray(Image.open(tmp_path / "samples" / "step-000004.png"))
    assert drawn[::2, ::2].tolist() == [[[4, 50, 1], [4, 51, 2]], [[4, 52, 3], [0, 0, 0]]]


def test_a_resumed_run_goes_on_with_its_grids(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, max_steps=3, callbacks=[SampleGrid(["a"], 2)])
    first.fit(Counter(), TinyData())
    first.save_checkpoint(tmp_path / "last.ckpt")
    module = Counter()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[SampleGrid(["a"], 2)])
    trainer.fit(module, TinyData(), ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, *_ in module.asked] == [4, 6]
    assert names(tmp_path) == ["step-000002.png", "step-000004.png", "step-000006.png"]


@pytest.mark.parametrize("arguments", [{"prompts": []}, {"prompts": ["a"], "every_n_train_steps": 0}])
def test_nothing_to_draw_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="SampleGrid needs at least one prompt"):
        SampleGrid(**arguments)
