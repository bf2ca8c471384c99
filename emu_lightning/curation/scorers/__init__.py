"""What is measured of pictures, one family of scorers in a file. None imports torch until it is started."""

from emu_lightning.curation.scorers.clip import (
    AestheticHead,
    Clip,
    Head,
    LearntHead,
    OffensiveHead,
    Probe,
    ZeroShot,
)
from emu_lightning.curation.scorers.concept import TimmConcept
from emu_lightning.curation.scorers.hashes import Hashes
from emu_lightning.curation.scorers.ocr import OCR
from emu_lightning.curation.scorers.photometry import Photometry, Watermark

__all__ = [
    "OCR",
    "AestheticHead",
    "Clip",
    "Hashes",
    "Head",
    "LearntHead",
    "OffensiveHead",
    "Photometry",
    "Probe",
    "TimmConcept",
    "Watermark",
    "ZeroShot",
]
