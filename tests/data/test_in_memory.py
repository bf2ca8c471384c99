"""Pictures kept in memory, and those that are drawn larger than they are shown."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from emu_lightning.data import WorldData
from emu_lightning.data.in_memory import InMemory
from emu_lightning.data.source import BrokenImage, Sample, Source
from emu_lightning.data.world import World


class Counted(World):
    """Counts how often each picture is drawn; every seventh is broken."""

    drawn: Counter[int] = Counter()

    def __getitem__(self, index: int) -> Sample:
        Counted.drawn[index] += 1
        if index % 7 == 6:
            raise BrokenImage(str(index), "broken")
        return super().__getitem__(index)

    def order(self, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        return np.arange(len(indices))[::-1]


def test_each_picture_is_drawn_once_and_is_what_it_was() -> None:
    Counted.drawn.clear()
    kept, world = InMemory(Counted(8, 6)), World(8, 6)
    for index in (3, 0, 3, 5, 0, 3):
        sample, again = kept[index], world[index]
        assert np.array_equal(sample.image, again.image)
        assert (sample.text, sample.uid, sample.original_size) == (again.text, again.uid, again.original_size)
    assert Counted.drawn == {3: 1, 0: 1, 5: 1}
    assert np.array_equal(pickle.loads(pickle.dumps(kept))[3].image, world[3].image)  # as data workers do it


def test_a_broken_picture_stays_broken() -> None:
    kept = InMemory(Counted(8, 20))
    for _ in range(2):
        with pytest.raises(BrokenImage):
            kept[6]


def test_every_question_is_answered_by_the_source_without_drawing() -> None:
    """None that `Source` answers by itself was forgotten: it would draw every picture for it."""
    Counted.drawn.clear()
    source = Counted(8, 20, seed=3)
    kept = InMemory(source)
    questions = {
        "__len__": (),
        "fingerprint": (),
        "uid": (4,),
        "text": (4,),
        "size": (4,),
        "uids": (),
        "sizes": (),
        "order": (0, 1, np.arange(5)),
    }
    assert questions.keys() == {name for name in vars(Source) if callable(getattr(Source, name))} - {
        "__getitem__"
    }
    for name, arguments in questions.items():
        ours, theirs = (getattr(each, name)(*arguments) for each in (kept, source))
        assert np.array_equal(ours, theirs), name
    assert not Counted.drawn


def batches(**arguments: object) -> list[torch.Tensor]:
    """The images of two passes over ten pictures."""
    data = WorldData(pool_size=10, val_size=3, resolution=16, batch_size=5, num_workers=0, **arguments)
    return [batch.images for _, batch in zip(range(4), data.train_dataloader(), strict=False)]


def test_what_is_kept_is_trained_on_in_the_same_order() -> None:
    assert all(map(torch.equal, batches(), batches(keep_in_memory=True)))


def test_pictures_are_drawn_large_and_shown_small() -> None:
    data = WorldData(
        pool_size=4, val_size=3, resolution=16, drawn_size=32, batch_size=3, num_workers=0, world_seed=5
    )
    assert data.train_source().fingerprint() == World(32, 4, 5).fingerprint()
    for loader, world in (
        (data.val_dataloader(), World(32, 3, 6)),
        (data.test_dataloader(), World(32, 3, 6, triples="held_out")),
    ):
        (batch,) = loader
        for index, image in enumerate(batch.images):
            large = Image.fromarray(world[index].image)
            small = np.asarray(large.resize((16, 16), Image.Resampling.BOX), np.float32) / 127.5 - 1
            assert np.abs(image.permute(1, 2, 0).numpy() - small).mean() < 0.05  # whichever the filter
        assert batch.original_size.tolist() == [[32, 32]] * 3 and batch.target_size.tolist() == [[16, 16]] * 3


def test_pictures_are_drawn_at_the_resolution_where_nothing_else_is_said() -> None:
    assert WorldData(resolution=16).val_source().fingerprint() == World(16, 256, 1).fingerprint()
