"""Automatic metrics: scores of single pictures, and of sets of them on the features of any network.

Weights come from disk, by path or by the hub id of what was fetched before; nothing is downloaded. What
cannot be computed says why, and is never a zero. A number carries the network, the hash of its weights and
its preprocessing, since without them it cannot be repeated.
"""

from emu_lightning.evaluation.metrics.embedders import (
    Embedder,
    ModuleEmbedder,
    Network,
    OpenClipEmbedder,
    TimmEmbedder,
    TransformersClip,
    TransformersVision,
)
from emu_lightning.evaluation.metrics.geneval import read_geneval, write_geneval_folder
from emu_lightning.evaluation.metrics.image_reward import ImageReward
from emu_lightning.evaluation.metrics.measured import Measured, check_comparable, difference
from emu_lightning.evaluation.metrics.model_judge import ModelJudge
from emu_lightning.evaluation.metrics.pareto import CheckpointPoint, checkpoints_on_front, pareto_front
from emu_lightning.evaluation.metrics.picture_scorers import (
    HPS,
    AestheticScore,
    ClipScore,
    PickScore,
    PictureScorer,
)
from emu_lightning.evaluation.metrics.questions import DSG, TIFA, FileAnswers, ModelAnswers
from emu_lightning.evaluation.metrics.set_metrics import (
    CMMD,
    Features,
    FrechetDistance,
    KernelDistance,
    Manifold,
    SetMetric,
    Vendi,
    embed,
)
from emu_lightning.evaluation.metrics.suite import measure_geneval, measure_pictures, measure_sets
from emu_lightning.evaluation.metrics.vlm import VisionLanguageModel, VQAScore

__all__ = [
    "CMMD",
    "DSG",
    "HPS",
    "TIFA",
    "AestheticScore",
    "CheckpointPoint",
    "ClipScore",
    "Embedder",
    "Features",
    "FileAnswers",
    "FrechetDistance",
    "ImageReward",
    "KernelDistance",
    "Manifold",
    "Measured",
    "ModelAnswers",
    "ModelJudge",
    "ModuleEmbedder",
    "Network",
    "OpenClipEmbedder",
    "PickScore",
    "PictureScorer",
    "SetMetric",
    "TimmEmbedder",
    "TransformersClip",
    "TransformersVision",
    "VQAScore",
    "Vendi",
    "VisionLanguageModel",
    "check_comparable",
    "checkpoints_on_front",
    "difference",
    "embed",
    "measure_geneval",
    "measure_pictures",
    "measure_sets",
    "pareto_front",
    "read_geneval",
    "write_geneval_folder",
]
