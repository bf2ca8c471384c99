"""Everything periodic: checkpoints, metrics, progress, pictures, judgements, reports.

They speak to any module by its interface.
"""

from emu_lightning.callbacks.preference import PreferenceEvaluation
from emu_lightning.callbacks.samples import SampleGrid, SideBySide

__all__ = ["PreferenceEvaluation", "SampleGrid", "SideBySide"]
