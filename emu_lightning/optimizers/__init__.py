"""Optimizers and schedules that torch has not, or not in one piece; every other is named by its class path.

They take parameters only, without names, and are one optimizer to a trainer, so that one learning rate, one
schedule and one gradient clip hold for all weights.
"""

from emu_lightning.optimizers.adamw import AdamW
from emu_lightning.optimizers.muon import Muon
from emu_lightning.optimizers.schedules import WarmupCosine

__all__ = ["AdamW", "Muon", "WarmupCosine"]
