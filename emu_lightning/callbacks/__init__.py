"""Everything periodic: checkpoints, metrics, progress, pictures, judgements, reports.

They speak to any module by its interface.
"""

from emu_lightning.callbacks.acceleration import Acceleration
from emu_lightning.callbacks.held_out import HeldOutEvaluation
from emu_lightning.callbacks.preference import PreferenceEvaluation
from emu_lightning.callbacks.samples import SampleGrid, SideBySide
from emu_lightning.callbacks.schedule_free import ScheduleFree
from emu_lightning.callbacks.super_resolution_grid import SuperResolutionGrid
from emu_lightning.callbacks.throughput import Throughput
from emu_lightning.callbacks.wandb_run import WandbRun

__all__ = [
    "Acceleration",
    "HeldOutEvaluation",
    "PreferenceEvaluation",
    "SampleGrid",
    "ScheduleFree",
    "SideBySide",
    "SuperResolutionGrid",
    "Throughput",
    "WandbRun",
]
