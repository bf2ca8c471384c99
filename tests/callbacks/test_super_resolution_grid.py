from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.callbacks import SuperResolutionGrid
from emu_lightning.data import WorldData
from emu_lightning.evaluation.generation import to_images, to_uint8
from tests.tiny import TinyData, make_trainer, tiny_generator, tiny_upsampler


def world() -> WorldData:
    return WorldData(pool_size=8, val_size=3, resolution=16, batch_size=4, num_workers=0)


def fit(folder: Path, callback: SuperResolutionGrid, module=None, data=None, **arguments) -> torch.nn.Module:
    module = tiny_upsampler() if module is None else module
    make_trainer(folder, callbacks=[callback], **arguments).fit(module, data or world())
    return module


def rows(path: Path) -> list[np.ndarray]:
    """Three rows of pictures (columns, 16, 16, 3)."""
    grid = np.asarray(Image.open(path))
    return [row.reshape(16, -1, 16, 3).swapaxes(0, 1) for row in np.split(grid, 3)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_small_made_and_original_stand_above_each_other(tmp_path: Path, accumulate: int) -> None:
    callback = SuperResolutionGrid(num_pictures=2, every_n_train_steps=2, first_seed=5)
    module = fit(tmp_path, callback, max_steps=4, accumulate_grad_batches=accumulate)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-000002.png", "step-000004.png"]
    enlarged, made, originals = rows(tmp_path / "samples" / "step-000004.png")
    source = world().val_source()
    assert np.array_equal(originals, np.stack([np.asarray(source[i].image) for i in range(2)]))
    small = enlarged[:, ::2, ::2]
    assert np.array_equal(enlarged, small.repeat(2, 1).repeat(2, 2))
    for picture, original in zip(small, originals, strict=True):
        reduced = np.asarray(Image.fromarray(original).resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
        assert abs(picture - reduced).max() <= 1
    # By hand, of the small pictures as they were drawn: rounding to 8 bits may show.
    again = to_uint8(module.upsample(to_images(small), [source[i].text for i in range(2)], [5, 6]))
    assert abs(again.astype(int) - made).max() <= 6 and abs(made.astype(int) - originals).max() > 50


def test_no_more_pictures_than_there_are(tmp_path: Path) -> None:
    fit(tmp_path, SuperResolutionGrid(num_pictures=8, every_n_train_steps=1), max_steps=1)
    assert [len(row) for row in rows(tmp_path / "samples" / "step-000001.png")] == [3, 3, 3]


def test_what_it_cannot_show_is_said(tmp_path: Path) -> None:
    grid = SuperResolutionGrid()
    with pytest.raises(ValueError, match="DiffusionModule is no super-resolution stage, .* SampleGrid draws"):
        fit(tmp_path, grid, tiny_generator(), max_steps=1)
    with pytest.raises(ValueError, match="TinyData has no validation pictures for SuperResolutionGrid"):
        fit(tmp_path, grid, data=TinyData(), max_steps=1)
    with pytest.raises(ValueError, match="must be at least 1"):
        SuperResolutionGrid(num_pictures=0)
