"""What every scorer is: a function from pictures to columns, with a name and a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A picture that could be decoded, with what is known of it.

    Attributes:
        content: the file's bytes as they are.
        image: upright, RGB.
        row: `uid`, `uri` and `caption`, which may be None. What else its pool says of it may change without
            the picture, and is for columns of the pool.
    """

    content: bytes
    image: Image.Image
    row: Mapping[str, Any]


class Scorer(ABC):
    """Writes columns about pictures. It judges nothing: thresholds are filters, over these columns.

    A scorer is configured, sent to the processes that work, and started there: it must be small until then.
    The scores of a picture are a function of the picture alone, never of its neighbours in a batch.

    Attributes:
        columns: name and type of what it writes; values may be missing (None), but say so in the docstring.
        batch_size: pictures that it is given at once.
    """

    columns: Mapping[str, pa.DataType]
    batch_size: int = 1

    @property
    def name(self) -> str:
        """Of its scores' folder; two scorers of one run may not share it."""
        return type(self).__name__.lower()

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of all that its scores depend on: version, arguments, sha256 of weights.

        Scores of another fingerprint are not used.
        """

    def weights_sha256(self) -> Mapping[str, str]:
        """Of every file of weights: its name and hash, for the manifest."""
        return {}

    def start(self) -> None:  # noqa: B027  # some need nothing
        """Loads what it needs, once in every process, before the first pictures.

        Raises:
            FileNotFoundError: weights are missing; nothing is ever downloaded unasked.
        """

    @abstractmethod
    def score(self, pictures: Sequence[Picture]) -> Columns:
        """`columns` of B pictures, B values each."""
