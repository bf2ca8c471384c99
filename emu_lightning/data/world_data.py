"""The synthetic world as training data."""

from __future__ import annotations

from typing import Any

from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.in_memory import InMemory
from emu_lightning.data.source import Source
from emu_lightning.data.world import World


class WorldData(ImageData):
    """A pool of the synthetic world.

    Validation draws other pictures of the same kind; test draws the triples (subject, colour, background)
    that training never shows.

    Args:
        pool_size: pictures to train on.
        val_size: pictures for validation and for test.
        world_seed: another seed is another world's pool.
        skilled_fraction: share of pictures a skilled photographer shot, in [0, 1].
        drawn_size: side at which pictures are drawn, before they are resized to `resolution`; the same where
            left out.
        keep_in_memory: draw each training picture once (12 kB at 64 pixels, per data worker).
        kwargs: of :class:`~emu_lightning.data.datamodule.ImageData`.
    """

    def __init__(
        self,
        pool_size: int = 20000,
        val_size: int = 256,
        world_seed: int = 0,
        skilled_fraction: float = 0.1,
        drawn_size: int | None = None,
        keep_in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pool_size, self.val_size = pool_size, val_size
        self.world_seed, self.skilled_fraction = world_seed, skilled_fraction
        self.drawn_size, self.keep_in_memory = drawn_size or self.resolution, keep_in_memory

    def train_source(self) -> Source:
        world = World(self.drawn_size, self.pool_size, self.world_seed, self.skilled_fraction)
        return InMemory(world) if self.keep_in_memory else world

    def val_source(self) -> Source:
        return World(self.drawn_size, self.val_size, self.world_seed + 1, self.skilled_fraction)

    def test_source(self) -> Source:
        return World(
            self.drawn_size, self.val_size, self.world_seed + 1, self.skilled_fraction, triples="held_out"
        )
