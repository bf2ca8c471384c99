"""What every scorer is: a function from pictures to columns, with a name and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

Columns = Mapping[str, Sequence[Any]]


def fingerprint(*parts: Any) -> str:
    """Hash of all that scores depend on, given as what JSON knows."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


class Derived(ABC):
    """Columns that are a function of a scorer's own columns of the same picture, and not of its pixels.

    They lie in files of their own: where one is new or changed, it is computed of what is stored, and no
    picture is read again.

    Attributes:
        columns: name and type of what it writes.
    """

    columns: Mapping[str, pa.DataType]

    @property
    def name(self) -> str:
        """Of its scores' folder, behind the scorer's name."""
        return next(iter(self.columns))

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of all that its columns depend on besides the scorer's own."""

    def weights_sha256(self) -> Mapping[str, str]:
        """Of each file of weights, by the name that the configuration gives it."""
        return {}

    @abstractmethod
    def derive(self, own: pa.Table) -> Columns:
        """`columns` of B pictures, from the scorer's own as they are stored. The scorer has been started."""


class Scorer(ABC):
    """Writes columns about pictures. It judges nothing: thresholds are filters, over these columns.

    A scorer is configured, sent to the processes that work, and started there: it must be small until then.
    The scores of a picture are a function of the picture alone, never of its neighbours in a batch.

    Attributes:
        columns: name and type of what it writes; values may be missing (None), but say so in the docstring.
        batch_size: pictures that it is given at once.
        derived: what else is computed from its columns.
    """

    columns: Mapping[str, pa.DataType]
    batch_size: int = 1
    derived: Sequence[Derived] = ()

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
        """Of each file of weights that it has itself, by the name that the configuration gives it."""
        return {}

    def start(self) -> None:  # noqa: B027  # some need nothing
        """Loads what it needs, once in every process, before the first pictures.

        Raises:
            FileNotFoundError: weights are missing; nothing is ever downloaded unasked.
        """

    @abstractmethod
    def score(self, pictures: Sequence[Picture]) -> Columns:
        """`columns` of B pictures, B values each."""
