"""Metrics of a set of pictures, most of them against a reference set, on the features of any embedder.

None of them says whether a picture shows its prompt. Distances to a reference are alarms about a regression,
not claims: a tuned model is meant to leave what its pre-training resembled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from emu_lightning.evaluation.metrics import distances
from emu_lightning.evaluation.metrics.embedders import Embedder, Network, Pictures, network_of
from emu_lightning.evaluation.metrics.measured import Measured


@dataclass(frozen=True)
class Features:
    """Features (N, D) of N pictures, and the network that made them."""

    values: NDArray[Any]
    network: Network

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not np.isfinite(self.values).all():
            raise ValueError(
                f"features {self.values.shape} of {self.network.name} are not (N, D) finite numbers"
            )


def embed(embedder: Embedder, images: Pictures) -> Features:
    return Features(embedder.embed_images(images), network_of(embedder))


class SetMetric(ABC):
    """One or several numbers about a set.

    Attributes:
        names: of the numbers.
        better: which are the better ones.
        depends_on_num: see :class:`Measured`.
        settings: the metric's own.
    """

    names: tuple[str, ...]
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    depends_on_num: ClassVar[bool] = True

    @property
    def settings(self) -> Mapping[str, Any]:
        return vars(self)

    def measure(self, features: Features, reference: Features | None = None) -> list[Measured]:
        """One number for each of `names`.

        Args:
            features: of the pictures that are judged.
            reference: of those that they are compared with, made by the same network.

        Raises:
            ValueError: there are too few pictures, or the sets do not belong together.
        """
        if reference is not None and reference.network != features.network:
            raise ValueError(
                f"features were made by {features.network}, those of the reference by {reference.network}: "
                "embed both sets by one network"
            )
        values, details = self._compute(features, reference)
        return [
            Measured(
                name,
                value,
                num=len(features.values),
                num_reference=None if reference is None else len(reference.values),
                networks=(features.network,),
                settings=dict(self.settings),
                details=details,
                better=self.better,
                depends_on_num=self.depends_on_num,
            )
            for name, value in zip(self.names, values, strict=True)
        ]

    @abstractmethod
    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        """Values of `names`, and details."""

    def _needed(self, reference: Features | None) -> NDArray[Any]:
        if reference is None:
            raise ValueError(f"{self.names[0]} compares with a reference set: give one")
        return reference.values


class FrechetDistance(SetMetric):
    """Fréchet distance; what is called FID has the features of the Inception network of TensorFlow.

    Its bias falls with the number of pictures and hides differences between models at the size of prompt
    sets: prefer :class:`KernelDistance` there.
    """

    names = ("Fréchet distance",)
    better = "lower"

    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        return [distances.frechet_distance(features.values, self._needed(reference))], {}


class KernelDistance(SetMetric):
    """Kernel distance; what is called KID has the features of Inception. Unbiased: about 0 for equal sets.

    Args:
        subset_size: pictures of each set that one estimate is of; published are 1000.
        num_subsets: estimates that are averaged.
        seed: of drawing the subsets.
    """

    names = ("kernel distance",)
    better = "lower"
    depends_on_num = False

    def __init__(self, subset_size: int, num_subsets: int = 100, seed: int = 0) -> None:
        self.subset_size, self.num_subsets, self.seed = subset_size, num_subsets, seed

    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        estimates = distances.kernel_distance(features.values, self._needed(reference), **self.settings)
        return [float(estimates.mean())], {"deviation_of_subsets": float(estimates.std())}


class CMMD(SetMetric):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024), times 1000 and biased, as it was published.

    Published on CLIP ViT-L/14 of OpenAI at 336 pixels; embeddings are brought to length 1.

    Args:
        sigma: width of the kernel.
    """

    names = ("CMMD",)
    better = "lower"

    def __init__(self, sigma: float = 10.0) -> None:
        self.sigma = sigma

    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        x, y = (distances.normalised(values) for values in (features.values, self._needed(reference)))
        return [1000 * distances.maximum_mean_discrepancy(x, y, self.sigma)], {}


class Vendi(SetMetric):
    """Vendi score by cosine similarity: how many different pictures the set is worth. Needs no reference.

    Args:
        order: how much rare kinds count, the less the larger; above 0, 1 is the published one, `.inf` asks
            for the largest kind only.
    """

    def __init__(self, order: float = 1.0) -> None:
        self.order = order

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"Vendi score of order {self.order:g}",)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"order": "infinity" if math.isinf(self.order) else self.order}  # JSON has no infinity

    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        return [distances.vendi_score(features.values, self.order)], {}


class Manifold(SetMetric):
    """Precision, recall, density and coverage: see :func:`.distances.precision_recall_density_coverage`.

    Args:
        num_neighbours: k; 3 is published for precision and recall, 5 for density and coverage.
    """

    names = ("precision", "recall", "density", "coverage")

    def __init__(self, num_neighbours: int = 5) -> None:
        self.num_neighbours = num_neighbours

    def _compute(
        self, features: Features, reference: Features | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        values = distances.precision_recall_density_coverage(
            features.values, self._needed(reference), self.num_neighbours
        )
        return values, {}
