"""From pictures to batches: sources, their order, their cached latents, and the data modules of Lightning."""

from emu_lightning.data.folder import FolderData
from emu_lightning.data.world import World
from emu_lightning.data.world_data import WorldData

__all__ = ["FolderData", "World", "WorldData"]
