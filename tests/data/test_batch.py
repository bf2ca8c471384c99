"""A batch at another resolution, against Pillow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.data.batch import resized
from tests.tiny import make_batch


@pytest.mark.parametrize("side", [5, 8, 12])
def test_images_are_made_smaller_as_by_pillow(side: int) -> None:
    batch = make_batch(3, size=2, side=24)
    images = resized(batch, side).images
    assert images.shape == (2, 3, side, side)
    for image, original in zip(images.flatten(0, 1), batch.images.flatten(0, 1), strict=True):
        plane = Image.fromarray(original.numpy(), mode="F").resize((side, side), Image.Resampling.BICUBIC)
        assert np.allclose(image, np.asarray(plane).clip(-1, 1), atol=1e-5)


def test_overshoot_stays_in_range() -> None:
    stripes = torch.ones(1, 3, 12, 12)
    stripes[..., ::3] = -1
    images = resized(replace(make_batch(0, 1, 12), images=stripes), 9).images
    assert images.abs().max() == 1  # bicubic weights are negative at their ends


def test_sizes_are_those_of_the_resized_picture() -> None:
    """Told of a photograph of 400 x 600 pixels, shown at 24 from row 12 and column 6 of the shrunk one."""
    batch = make_batch(3, size=1, side=24)
    batch.original_size = torch.tensor([[400, 600]])
    batch.crop = torch.tensor([[12, 6]])
    small = resized(batch, 8)
    assert small.original_size.tolist() == [[400, 600]]
    assert small.crop.tolist() == [[4, 2]] and small.crop.dtype == batch.crop.dtype
    assert small.target_size.tolist() == [[8, 8]]
    assert (small.texts, small.uids, small.positions) == (batch.texts, batch.uids, batch.positions)
    assert batch.images.shape[-1] == 24 and batch.target_size.tolist() == [[24, 24]]  # as it was


def test_a_batch_of_the_right_size_is_left_alone() -> None:
    batch = make_batch(0, side=8)
    assert resized(batch, 8) is batch


def test_what_no_stage_can_learn_from_is_named() -> None:
    batch = make_batch(0, side=8)
    with pytest.raises(ValueError, match="images of 8x8 are too small for a stage of 16 pixels: raise"):
        resized(batch, 16)
    with pytest.raises(ValueError, match="gives 8x4: leave data.buckets out"):
        resized(replace(batch, images=batch.images[..., :4]), 4)
    with pytest.raises(ValueError, match="the data gives latents: switch their cache off"):
        resized(replace(batch, images=None, latents=batch.images), 4)
