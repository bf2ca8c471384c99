"""Emu (Dai et al. 2023) in PyTorch Lightning: from images to an honest win rate.

Importing this package imports nothing heavy: `emu --help` must answer at once.
"""

__version__ = "0.1.0"
