"""Prompt sets: what is drawn for an evaluation, with a hash that says exactly which prompts those were."""

from __future__ import annotations

import csv
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# PartiPrompts (Apache-2.0) as published, 1632 rows. Not part of this project: point to your copy.
PARTI_SHA256 = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
_PARTI_COLUMNS = ("Prompt", "Category", "Challenge")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        name: what reports call it.
        prompts: the texts.
        categories: one per prompt, or empty where the set has none.
        challenges: one per prompt, or empty; PartiPrompts' second grouping.
        sha256: of the file, or of the prompts where they come from no file.
    """

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    challenges: tuple[str, ...]
    sha256: str

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} is empty: give at least one prompt")
        for field in (self.categories, self.challenges):
            if field and len(field) != len(self.prompts):
                raise ValueError(
                    f"prompt set {self.name!r} has {len(self.prompts)} prompts but {len(field)} "
                    "categories or challenges: give one for each prompt, or none"
                )

    @classmethod
    def of(cls, name: str, prompts: Sequence[str], categories: Sequence[str] = ()) -> PromptSet:
        """A set made in memory, hashed over its prompts, one a line."""
        return cls(name, tuple(prompts), tuple(categories), (), _sha256("\n".join(prompts).encode()))

    def stylized(self) -> PromptSet:
        """Our stand-in for the paper's stylized subset (sketches, cartoons), whose choice it does not tell.

        Category Illustrations or Arts, or challenge Style & Format: 328 of PartiPrompts' 1632.
        """
        rows = [
            row
            for row in zip(self.prompts, self.categories, self.challenges, strict=True)
            if row[1] in ("Illustrations", "Arts") or row[2] == "Style & Format"
        ]
        prompts, categories, challenges = zip(*rows, strict=True) if rows else ((), (), ())
        return PromptSet(
            f"{self.name}, stylized (our choice)",
            prompts,
            categories,
            challenges,
            _sha256("\n".join(prompts).encode()),
        )

    def __len__(self) -> int:
        return len(self.prompts)


def read_parti(path: str | Path) -> PromptSet:
    """Reads ``PartiPrompts.tsv`` (columns Prompt, Category, Challenge, Note).

    A file other than the published one is read with a warning: its results are not PartiPrompts results.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or a row has no prompt.
    """
    data = Path(path).read_bytes()
    # QUOTE_NONE: some prompts hold single quotation marks, which would swallow the rows that follow.
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = [column for column in _PARTI_COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}: give the tab-separated file PartiPrompts.tsv")
    prompts, categories, challenges = (
        tuple((row[column] or "").strip() for row in rows) for column in _PARTI_COLUMNS
    )
    if "" in prompts:
        raise ValueError(f"{path} has no prompt in row {prompts.index('') + 1}: mend or remove the row")
    sha256 = _sha256(data)
    if sha256 != PARTI_SHA256:
        warnings.warn(
            f"{path} is not PartiPrompts as published (sha256 {sha256[:12]}, expected "
            f"{PARTI_SHA256[:12]}; {len(prompts)} rows, expected 1632)",
            stacklevel=2,
        )
    return PromptSet("PartiPrompts", prompts, categories, challenges, sha256)


def read_lines(path: str | Path) -> PromptSet:
    """Reads a UTF-8 text file with one prompt a line; blank lines are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no prompt.
    """
    data = Path(path).read_bytes()
    prompts = tuple(line.strip() for line in data.decode("utf-8-sig").split("\n") if line.strip())
    return PromptSet(Path(path).stem, prompts, (), (), _sha256(data))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
