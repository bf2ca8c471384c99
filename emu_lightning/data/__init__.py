"""From pictures to batches: sources, their order, their cached latents, and the data modules of Lightning."""

from emu_lightning.data.buckets import Buckets
from emu_lightning.data.folder import FolderData
from emu_lightning.data.manifest import Manifest, ManifestData
from emu_lightning.data.shards import ShardData, Shards
from emu_lightning.data.world import World
from emu_lightning.data.world_data import WorldData

__all__ = ["Buckets", "FolderData", "Manifest", "ManifestData", "ShardData", "Shards", "World", "WorldData"]
