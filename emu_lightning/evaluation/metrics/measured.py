"""What a metric answers: a number with all that it depends on, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from emu_lightning.evaluation.metrics.embedders import Network


@dataclass(frozen=True)
class Measured:
    """A metric of a set of pictures.

    Attributes:
        name: of the metric.
        value: the number; None where it could not be computed, never a zero in its place.
        reason: why there is no value.
        num: pictures that were measured.
        num_reference: pictures that they were measured against.
        networks: what made the features or scores.
        settings: of the metric; numbers of different settings are not compared.
        details: what else came out.
        ci95: interval of a mean over prompts.
        better: which numbers are the better ones.
        depends_on_num: the number moves with `num` even where the pictures do not get better or worse, so
            that only numbers of equally many pictures are compared.
    """

    name: str
    value: float | None
    reason: str = ""
    num: int = 0
    num_reference: int | None = None
    networks: tuple[Network, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    ci95: tuple[float, float] | None = None
    better: Literal["higher", "lower"] = "higher"
    depends_on_num: bool = False

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.reason):
            raise ValueError(f"{self.name}: a metric has a value, or else the reason why it has none")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}: leave it out, and give the reason")

    def to_dict(self) -> dict[str, Any]:
        """For `results.json`: without what does not apply, so that a missing value has its reason only."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", (), {})}


def check_comparable(first: Measured, *others: Measured) -> None:
    """Refuses numbers whose difference would say something else than which pictures are better.

    Raises:
        ValueError: one is missing, they are of different metrics, networks or settings, or they are of
            different numbers of pictures and move with that: two samples of one standard normal in 256
            dimensions are 111 apart by the Fréchet distance at 300 samples, 34 at 1000 and 3 at 10,000.
    """
    for one in (first, *others):
        if one.value is None:
            raise ValueError(f"{one.name} cannot be compared, it is missing: {one.reason}")
        for what in ("name", "networks", "settings"):
            if getattr(one, what) != getattr(first, what):
                raise ValueError(
                    f"{first.name} and {one.name} are not compared, they differ in {what}: "
                    f"{getattr(first, what)} and {getattr(one, what)}"
                )
        nums = [(one.num, one.num_reference), (first.num, first.num_reference)]
        if one.depends_on_num and nums[0] != nums[1]:
            raise ValueError(
                f"{one.name} moves with the number of pictures: {one.num} (against {one.num_reference}) and "
                f"{first.num} (against {first.num_reference}) are not compared, measure equally many"
            )


def difference(measured: Measured, other: Measured) -> float:
    """How much better `measured` is than `other`: positive is better, whichever way the metric counts.

    Raises:
        ValueError: see :func:`check_comparable`.
    """
    check_comparable(measured, other)
    assert measured.value is not None and other.value is not None
    return measured.value - other.value if measured.better == "higher" else other.value - measured.value
